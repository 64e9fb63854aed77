"""A seccomp filter that forbids io_uring, as container runtimes do. For a process of its own: it cannot be taken back."""

from __future__ import annotations

import ctypes
import struct

_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER = 38, 22, 2
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_SETUP, _ENTER = 425, 426


def forbid_ring(error: int, *, setup: bool = True) -> None:
    """From now on io_uring_enter, and with `setup` io_uring_setup, fail with this error in the process and its children."""
    calls = [_ENTER, *([_SETUP] if setup else [])]
    program = [(_LOAD, 0, 0, 0)]  # the number of the system call
    program += [(_EQUAL, len(calls) - at, 0, call) for at, call in enumerate(calls)]
    program += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | error)]
    code = b"".join(struct.pack("<HBBI", *line) for line in program)
    room = ctypes.create_string_buffer(code)
    header = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(room))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    filter_ = ctypes.create_string_buffer(header)
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_SET_SECCOMP, _FILTER, ctypes.addressof(filter_), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp is not to be had")
