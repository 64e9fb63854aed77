"""An open layer file, and whether it has changed since it was opened."""

from __future__ import annotations

import ctypes
import errno
import os
import zlib
from typing import Final

from hf_flash.base.buffers import allocate_pages
from hf_flash.base.files import read_at
from hf_flash.compute import library as native

_VERIFIED_BYTES: Final = 1 << 20


_LARGEST_HEADER: Final = 1 << 27


class FileChangedError(OSError):
    """The file has changed since it was opened: bytes that were read may be of the old or the new contents."""

    def __init__(self) -> None:
        super().__init__(errno.ESTALE, "the file was changed since the model was loaded")


def file_too_short() -> OSError:
    """The error for a read that reached the end of the file."""
    return OSError(errno.EIO, "end of file: the file is shorter than when it was opened")


class OpenFile:
    """A file that is open for reading, and its state when it was opened.

    Args:
        fd: an open file descriptor; its owner closes it.
        align: offsets, lengths and addresses of direct reads are multiples of this; 0: reads go through the page cache.
        transient: whether pages are removed from the page cache after they were read.
        only_contents: whether to ignore changes of the inode alone, such as another link to the file. This is for files that
            others wrote, which have no checksum to verify by.
    """

    def __init__(self, fd: int, align: int, *, transient: bool = False, only_contents: bool = False) -> None:
        self.fd, self.align, self.transient, self._only_contents = fd, align, transient, only_contents
        nowait = not align and _takes_nowait(fd)
        self.state = native.File(  # shared with the compiled part, which changes `nowait`
            fd=fd, align=align, nowait=nowait, only_contents=only_contents
        )
        self._set(self._identity())

    @property
    def address(self) -> int:
        return ctypes.addressof(self.state)

    @property
    def changed(self) -> bool:
        """Whether the file, or (without `only_contents`) its inode, has changed since it was opened or last verified."""
        return self._identity() != self._known

    def verify(self, crc32: str) -> None:
        """Accept the file as it is now, if its data still has this checksum.

        Raises:
            FileChangedError: the checksum differs, or the file keeps changing.
        """
        for _ in range(3):
            now = self._identity()
            if _crc_of_data(self.fd) != crc32:
                break
            if self._identity() == now:
                self._set(now)
                return
        raise FileChangedError

    def _identity(self) -> tuple[int, int, int]:
        found = os.fstat(self.fd)
        return found.st_size, found.st_mtime_ns, 0 if self._only_contents else found.st_ctime_ns

    def _set(self, known: tuple[int, int, int]) -> None:
        self._known = known
        self.state.size, modified, changed = known
        self.state.modified_s, self.state.modified_ns = divmod(modified, 10**9)
        self.state.changed_s, self.state.changed_ns = divmod(changed, 10**9)


def _takes_nowait(fd: int) -> bool:
    """Whether a read through the page cache can be limited to cached bytes (RWF_NOWAIT)."""
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:  # the page is not cached, but the flag is supported
        return True
    except (OSError, AttributeError):
        return False
    return True


def _crc_of_data(fd: int) -> str:
    """CRC-32 of the data behind the header of a safetensors file; another text if it has no valid header."""
    room, crc, at = memoryview(allocate_pages(_VERIFIED_BYTES)), 0, 0
    header = 0
    while got := read_at(fd, [room], at):
        if not at:
            header = 8 + int.from_bytes(room[:8], "little")
            if header > _LARGEST_HEADER:
                return "no header"
        crc = zlib.crc32(room[min(max(0, header - at), got) : got], crc)
        at += got
        if got % 4096:
            break  # the end of the file; a direct read could not go on from here
    return f"{crc:08x}"
