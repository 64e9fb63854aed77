"""`TableReader`: reads rows of a matrix in a plain checkpoint, such as the embedding, of which a token needs one row."""

from __future__ import annotations

import os
import weakref

import torch

from hf_flash.base.arrays import Ids, runs
from hf_flash.base.files import read_at
from hf_flash.errors import StoreReadError
from hf_flash.reading.layer_files import close_files, open_for_reading
from hf_flash.reading.open_file import FileChangedError, file_too_short
from hf_flash.store.checkpoint import Checkpoint
from hf_flash.store.safetensors_files import as_bytes


class TableReader:
    """Reads rows through the page cache, which keeps those that are requested again.

    Args:
        checkpoint: the checkpoint that holds the matrix.
        name: the name of its tensor, [rows, width].
    """

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.name, (self.dtype, (_, self.width)) = name, checkpoint.specs[name]
        self.path, self._offset = checkpoint.place(name)
        fds = list[int]()
        self._close = weakref.finalize(self, close_files, fds)
        self._file = open_for_reading(self.path, 0, fds, only_contents=True)

    def close(self) -> None:
        self._close()

    def read(self, ids: Ids) -> torch.Tensor:
        """Some rows in their stored dtype, [ids, width].

        Args:
            ids: int64, ascending, without duplicates; every row must exist.

        Raises:
            StoreReadError: the disk failed, or the file has changed.
        """
        found = torch.empty(len(ids), self.width, dtype=self.dtype, device="cpu")
        memory, nbytes = as_bytes(found).data, self.width * self.dtype.itemsize
        reads = [(self._offset + int(ids[begin]) * nbytes, begin * nbytes, end * nbytes) for begin, end in runs(ids)]
        try:
            if len(reads) > 1 and hasattr(os, "posix_fadvise"):
                for offset, begin, end in reads:  # all first, so that the disk reads many rows in parallel
                    os.posix_fadvise(self._file.fd, offset, end - begin, os.POSIX_FADV_WILLNEED)
            for offset, begin, end in reads:
                self._read(memory[begin:end], offset)
            if self._file.changed:
                raise FileChangedError
        except OSError as error:
            raise StoreReadError(
                "reading an embedding failed",
                where=f"{self.name} in {self.path}",
                expected="a file that nobody changes",
                got=error.strerror or str(error),
                hint="load the model again" if isinstance(error, FileChangedError) else "check the disk",
            ) from error
        return found

    def _read(self, memory: memoryview, offset: int) -> None:
        while len(memory):
            got = read_at(self._file.fd, [memory], offset)
            if not got:
                raise file_too_short()
            memory, offset = memory[got:], offset + got
