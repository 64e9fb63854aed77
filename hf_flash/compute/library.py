"""The compiled part (_native.c), as far as there is one: `library()` is `None` without it, and callers take the torch way.

It is a plain shared library beside this file, made at installation where there is a C compiler, and called through ctypes,
which gives up the interpreter's lock during a call. It computes on torch's own threads.

    TokenKernel      one token and the rows of some neurons, multiplied where they lie; what comes before that is runtime/token_step.py
    TokensKernel     the same for tokens that each use neurons of their own
    Product          a quantized matrix, to be multiplied with tokens
    linear           a matrix that stays in memory times a few tokens
    copy_rows        scattered rows to scattered places
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import Final

import torch

logger = logging.getLogger("hf_flash")

ABI: Final = 10  # as in _native.c: to be raised with every change of what a function or a structure means
GROUP_STEP: Final = 32  # columns that 4 bits are worked on at a time
DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SOFTLY: Final = 1  # omp_pause_soft: settings stay

_pointer, _long, _int, _double = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_double


class Job(ctypes.Structure):
    """One token and some neurons; the fields are explained in _native.c."""

    _fields_ = (
        *((name, _pointer) for name in ("x", "matrix", "bias", "rows", "ids", "which", "hidden", "out", "wide", "active")),
        *((name, _long) for name in ("n", "d", "todo", "share")), ("step", _pointer), ("waited", _double),
        *((name, _int) for name in ("dtype", "threads", "relu", "next", "settled")),
    )  # fmt: skip


class _Several(ctypes.Structure):
    """Several tokens and some neurons."""

    _fields_ = (
        *((name, _pointer) for name in ("x", "bias", "rows", "ids", "used", "hidden", "out", "place", "count", "packed")),
        *((name, _long) for name in ("n", "d", "d_ff", "tokens", "share")),
        *((name, _int) for name in ("dtype", "threads", "narrow", "pack", "next")),
    )


class _Matrix(ctypes.Structure):
    """A quantized matrix and some tokens."""

    _fields_ = (
        *((name, _pointer) for name in ("codes", "scales", "zeros", "plus", "times", "bias", "x", "steps", "step", "sums")),
        *((name, _pointer) for name in ("out", "called", "first")),
        *((name, _long) for name in ("rows", "columns", "group", "tokens")),
        *((name, _int) for name in ("bits", "dtype", "bias_dtype", "threads", "next", "done", "ready")),
    )  # fmt: skip


class _Linear(ctypes.Structure):
    """A matrix in the dtype of compute and some tokens."""

    _fields_ = (
        *((name, _pointer) for name in ("weight", "bias", "x", "wide", "out")),
        *((name, _long) for name in ("rows", "columns", "tokens")),
        *((name, _int) for name in ("dtype", "threads", "narrow", "next")),
    )


class _Rows(ctypes.Structure):
    """Rows of equal size to be copied."""

    _fields_ = (
        *((name, _pointer) for name in ("source", "target")),
        *((name, _long) for name in ("n", "bytes")),
        *((name, _int) for name in ("threads", "next")),
    )


class File(ctypes.Structure):
    """An open file as it was when it was opened; the fields are explained in _native_read.h."""

    _fields_ = (
        *((name, _long) for name in ("size", "modified_s", "modified_ns", "changed_s", "changed_ns")),
        *((name, _int) for name in ("fd", "align", "nowait", "unused")),
    )


class Order(ctypes.Structure):
    """Reads of one file; the fields are explained in _native_read.h."""

    _fields_ = (
        *((name, _pointer) for name in ("offsets", "first", "pieces")),
        *((name, _long) for name in ("n", "background")),
    )


class Window(ctypes.Structure):
    """The arrays and numbers of a window; the fields are explained in _native_step.h and runtime/window.py."""

    _fields_ = (
        *((name, _pointer) for name in ("slot_of", "pointer", "last_used", "unused", "worth")),
        *((name, _long) for name in ("d_ff", "capacity", "window", "clock", "free")),
        *((name, _double) for name in ("gain", "growth", "renew")),
    )


class Step(ctypes.Structure):
    """One token through one layer; the fields are explained in _native_step.h."""

    _fields_ = (
        ("job", Job), ("window", Window),
        *((name, _pointer) for name in ("reader", "file", "selected", "place", "ids", "rows", "there", "away", "pairs")),
        *((name, _pointer) for name in ("offsets", "first", "parts")),
        *((name, _long) for name in ("most", "reads", "offset", "bundle", "longest", "unit", "ticket", "failed")),
        *((name, _long) for name in ("used", "missing", "nbytes", "chunks")), ("managed", _double),
    )  # fmt: skip


STRUCTURES: Final = (Job, _Several, _Matrix, _Linear, _Rows, File, Order, Window, Step)  # in the order of `hf_sizes`


def load() -> ctypes.CDLL:
    """The compiled part; `HF_FLASH_NATIVE` names another build of it, or switches it off with `0`.

    Raises:
        OSError, AttributeError: it is not there, does not fit this processor, or is not what this file was written for.
    """
    usual = Path(__file__).with_name("_native" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so"))
    if (chosen := os.environ.get("HF_FLASH_NATIVE")) == "0":
        raise OSError("HF_FLASH_NATIVE=0 switches it off")
    found = ctypes.CDLL(chosen or str(usual))
    if not found.hf_supported():
        raise OSError("this processor lacks AVX2, FMA or F16C")
    if (abi := found.hf_abi()) != ABI:
        raise OSError(f"it is of version {abi}, not {ABI}: install hf_flash again")
    wanted, sizes = [ctypes.sizeof(kind) for kind in STRUCTURES], (ctypes.c_int64 * 64)()
    if (found_sizes := sizes[: found.hf_sizes(sizes)]) != wanted:
        raise OSError(f"its structures take {found_sizes} bytes, not {wanted}: install hf_flash again")
    return found


@lru_cache
def library() -> ctypes.CDLL | None:
    """[`load`], made ready; `None` without it."""
    try:
        found = load()
    except (OSError, AttributeError) as error:
        logger.warning(
            "hf_flash: no compiled part (%s): computing and reading with torch and Python alone takes about twice as long. "
            "Installing hf_flash again where there is a C compiler builds it",
            error,
        )
        return None
    everything = ctypes.CDLL(None)
    start, number = (getattr(everything, name, None) for name in ("GOMP_parallel", "omp_get_thread_num"))
    if start is not None and number is not None:  # torch's own OpenMP, which it loads for all to see
        found.hf_use_threads_of(start, number)
    found.hf_up.argtypes = found.hf_down.argtypes = [ctypes.POINTER(Job)]
    found.hf_several.argtypes = [ctypes.POINTER(_Several)]
    found.hf_multiply.argtypes = [ctypes.POINTER(_Matrix)]
    found.hf_linear.argtypes = [ctypes.POINTER(_Linear)]
    found.hf_copy.argtypes = [ctypes.POINTER(_Rows)]
    found.hf_step.argtypes = [ctypes.POINTER(Step)]
    found.hf_reader_open.argtypes, found.hf_reader_open.restype = [_int, _int, _pointer], _pointer
    found.hf_reader_has_ring.argtypes = found.hf_reader_close.argtypes = [_pointer]
    found.hf_read_start.argtypes, found.hf_read_start.restype = [_pointer, _pointer, ctypes.POINTER(Order)], _long
    found.hf_read_wait.argtypes, found.hf_read_settle.argtypes = [_pointer, _long], [_pointer, _int]
    return found


def try_ring() -> int:
    """Whether this process may use io_uring: 0, or the number of the error that says why not."""
    compiled = library()
    return errno.ENOSYS if compiled is None else int(compiled.hf_try_ring())


def threads() -> int:
    """Threads to compute on."""
    return torch.get_num_threads()


def release_threads() -> bool:
    """End the OpenMP threads that this one computes with, before a fork; returns whether that is possible.

    A forked process has none of them, but would wait for them. Whoever computes next starts new ones.
    """
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    return pause is not None and pause(_SOFTLY) == 0
