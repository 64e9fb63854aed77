"""The compiled part: a library loaded through ctypes, and the structures that it takes (native.h).

It is a plain shared library beside this file, built at installation if there is a C compiler. Calls release the interpreter's
lock, and compute on torch's own threads. kernels.py has the calls that compute, runtime/token_step.py the one that takes a few
tokens through a layer, and reading/compiled_queue.py those that read.

[`library`] is `None` without the compiled part; then torch and Python do its work. This is the case:

    HF_FLASH_NATIVE=0     for a process and its children. Any other value is the path of another build of the library.
    switched_off()        for everything that a process makes inside a `with` block
    no compiler, another processor, an installation that does not fit: this is logged once, with the reason
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Final

import torch

from hf_flash.base import dtypes

logger = logging.getLogger("hf_flash")

ABI: Final = 20  # HF_ABI of native.h; raise both when the meaning of a function or a structure changes
MOST_PIECES: Final = 8  # pieces of an expert (MOST_PIECES of native.h)
MOST_AHEAD: Final = 16  # experts that are read ahead, on a guess (MOST_AHEAD of native.h)
GROUP_STEP: Final = 32  # columns of a 4-bit matrix that are computed at a time
DTYPES: Final[Mapping[torch.dtype, int]] = {getattr(torch, name): number for number, name in enumerate(dtypes.DTYPES)}
"""The compute dtypes, as numbered in native.h."""
_SOFTLY: Final = 1  # omp_pause_soft: keeps the settings

_pointer, _long, _int, _double = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_double


# --- structures: their fields are explained in native.h


class RowLayout(ctypes.Structure):
    """Where the parts of a unit lie in a row of memory."""

    _fields_ = tuple((name, _long) for name in ("row_bytes", "gate_offset", "up_offset", "down_offset", "width"))


class ActivationFunction(ctypes.Structure):
    """An activation that the compiled part knows."""

    _fields_ = (("level", ctypes.c_float), ("code", _int), ("of_both", _int))


class Meanwhile(ctypes.Structure):
    """Work of the calling thread while other threads compute; only the compiled part sets it."""

    _fields_ = (*((name, _pointer) for name in ("begin", "end", "data")), ("waited_s", _double), ("ended", _int))


class TokenJob(ctypes.Structure):
    """One token and some neurons."""

    _fields_ = (
        ("layout", RowLayout),
        *((name, _pointer) for name in ("x", "matrix", "gate_bias", "bias", "rows", "ids", "positions", "hidden", "out")),
        *((name, _pointer) for name in ("x_f32", "active")),
        *((name, _long) for name in ("n", "todo", "share")), ("meanwhile", Meanwhile), ("activation", ActivationFunction),
        *((name, _int) for name in ("dtype", "threads", "next")),
    )  # fmt: skip


class TokensJob(ctypes.Structure):
    """Several tokens and some neurons."""

    _fields_ = (
        ("layout", RowLayout),
        *((name, _pointer) for name in ("x", "gate_bias", "bias", "rows", "ids", "used", "positions", "hidden", "values")),
        *((name, _pointer) for name in ("row_of", "count", "out", "packed")),
        *((name, _long) for name in ("n", "d_ff", "tokens", "todo", "share")), ("meanwhile", Meanwhile),
        ("activation", ActivationFunction),
        *((name, _int) for name in ("dtype", "threads", "no_avx512", "pack", "next")),
    )  # fmt: skip


class ProductJob(ctypes.Structure):
    """A quantized matrix and some tokens."""

    _fields_ = (
        *((name, _pointer) for name in ("codes", "scales", "zeros", "shift", "shift_scale", "bias", "x")),
        *((name, _pointer) for name in ("x_codes", "x_step", "x_sum", "out", "active", "first")),
        *((name, _long) for name in ("rows", "columns", "group", "tokens")),
        *((name, _int) for name in ("bits", "dtype", "bias_dtype", "threads", "no_vnni", "next", "done", "x_ready")),
    )


class Scales(ctypes.Structure):
    """The scales that numbers in 4 or 8 bits are multiplied with."""

    _fields_ = (
        ("at", _pointer), *((name, _long) for name in ("block_rows", "block_columns", "columns")), ("dtype", _int),
        ("unused", _int),
    )  # fmt: skip


class LinearJob(ctypes.Structure):
    """A matrix and some tokens."""

    _fields_ = (
        *((name, _pointer) for name in ("weight", "bias", "x", "x_f32", "out")),
        *((name, _long) for name in ("rows", "columns", "tokens", "out_stride")),
        ("scales", Scales),
        *((name, _int) for name in ("dtype", "weight_dtype", "turned", "threads", "no_avx512", "next")),
    )


class LinearsJob(ctypes.Structure):
    """Several matrices, each with tokens of its own, and reads to wait for."""

    _fields_ = (
        ("jobs", _pointer), ("n", _long), ("reader", _pointer), ("ticket", _long), ("meanwhile", Meanwhile),
        ("waited_s", _double), *((name, _int) for name in ("error", "threads", "no_avx512")),
    )  # fmt: skip


class AttentionJob(ctypes.Structure):
    """Attention of a few tokens."""

    _fields_ = (
        *((name, _pointer) for name in ("query", "key", "value", "mask", "out")),
        *((name, _long) for name in ("batch", "heads", "key_heads", "tokens", "length", "width", "value_width")),
        *((name, _long * 3) for name in ("query_steps", "key_steps", "value_steps")), ("mask_steps", _long * 4),
        ("room", _pointer), ("scale", ctypes.c_float),
        *((name, _int) for name in ("dtype", "mask_dtype", "threads", "no_avx512", "next")),
    )  # fmt: skip


class QuantizeJob(ctypes.Structure):
    """A matrix that is quantized."""

    _fields_ = (
        *((name, _pointer) for name in ("weights", "codes", "scales", "zeros", "error")),
        *((name, _long) for name in ("rows", "columns", "group", "row_bytes")),
        *((name, _int) for name in ("bits", "dtype", "threads", "next")),
    )


class CopyJob(ctypes.Structure):
    """Rows of equal size to be copied."""

    _fields_ = (
        *((name, _pointer) for name in ("source", "target")),
        *((name, _long) for name in ("n", "row_bytes")),
        *((name, _int) for name in ("threads", "next")),
    )


class File(ctypes.Structure):
    """An open file, and its state when it was opened."""

    _fields_ = (
        *((name, _long) for name in ("size", "modified_s", "modified_ns", "changed_s", "changed_ns")),
        *((name, _int) for name in ("fd", "align", "nowait", "only_contents")),
    )


class Order(ctypes.Structure):
    """Reads of one file."""

    _fields_ = (
        *((name, _pointer) for name in ("offsets", "first", "pieces")),
        *((name, _long) for name in ("n", "background", "threads")),
    )


class Window(ctypes.Structure):
    """The arrays and numbers of runtime/window.py: ResidentWindow."""

    _fields_ = (
        *((name, _pointer) for name in ("slot_of", "neuron_in", "last_used", "free_slots", "score")),
        *((name, _long) for name in ("d_ff", "capacity", "kept_tokens", "clock", "free")),
        *((name, _double) for name in ("use_score", "growth", "rescale_beyond")),
    )


class Step(ctypes.Structure):
    """A few tokens through one layer."""

    _fields_ = (
        ("job", TokenJob), ("several", TokensJob), ("window", Window),
        *((name, _pointer) for name in ("reader", "file", "selected", "used_by_any", "places", "place_of", "ids", "rows")),
        *((name, _pointer) for name in ("resident_at", "missing_at", "incoming", "offsets", "first", "pieces")),
        *((name, _long) for name in ("tokens", "max_used", "max_missing", "file_offset", "max_run", "block_bytes", "ticket")),
        *((name, _long) for name in ("failed", "used", "missing", "read_bytes", "chunks")),
        ("managed_s", _double), ("waited_s", _double),
    )  # fmt: skip


class AheadRead(ctypes.Structure):
    """An expert that is read on a guess."""

    _fields_ = (("expert", _long), ("count", _long), ("tickets", _long * (4 * MOST_PIECES)))


class ExpertWindow(ctypes.Structure):
    """The arrays and numbers of runtime/expert_slots.py."""

    _fields_ = (
        *((name, _pointer) for name in ("slots", "slot_of", "last_used", "free_slots")),
        *((name, _long) for name in ("experts", "capacity", "slot_bytes", "free", "clock", "ahead")),
        ("ahead_reads", AheadRead * MOST_AHEAD),
    )


class ExpertGate(ctypes.Structure):
    """The function between the products of an expert."""

    _fields_ = (("limit", ctypes.c_float), ("alpha", ctypes.c_float), ("code", _int))


class ExpertPiece(ctypes.Structure):
    """A piece of every expert."""

    _fields_ = (
        *((name, _long) for name in ("outputs", "inputs", "first_output", "scale_place")),
        ("scales", Scales), ("dtype", _int), ("turned", _int),
    )  # fmt: skip


class ExpertStep(ctypes.Structure):
    """A few tokens through the experts of a layer."""

    _fields_ = (
        *((name, _pointer) for name in ("window", "passing", "reader", "files", "orders", "first_order", "reads", "at")),
        ("piece", ExpertPiece * MOST_PIECES),
        *((name, _long) for name in ("pieces", "places", "up_pieces", "up_outputs", "neurons", "width")),
        ("up_bias", _pointer), ("down_bias", _pointer), ("gate", ExpertGate),
        *((name, _pointer) for name in ("x", "index", "weights", "out")),
        *((name, _long) for name in ("tokens", "k", "most_reads")),
        *((name, _int) for name in ("dtype", "weights_dtype", "threads", "no_avx512")),
        *((name, _long) for name in ("used", "hits", "read_bytes", "chunks", "ahead_used", "failed", "damaged")),
        ("error", _int), ("unused", _int), ("managed_s", _double), ("waited_s", _double),
    )  # fmt: skip


STRUCTURES: Final = (  # in the order of `hf_sizes`
    RowLayout, TokenJob, TokensJob, ProductJob, LinearJob, CopyJob, File, Order, Window, Step, QuantizeJob,
    LinearsJob, ExpertWindow, ExpertGate, ExpertPiece, ExpertStep, AttentionJob,
)  # fmt: skip


# --- the library


def load() -> ctypes.CDLL:
    """Find the compiled part, and check that it fits.

    Raises:
        OSError, AttributeError: it is missing, does not fit this processor, or does not match this file.
    """
    usual = Path(__file__).with_name("_native" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so"))
    if (chosen := os.environ.get("HF_FLASH_NATIVE")) == "0":
        raise OSError("HF_FLASH_NATIVE=0 switches it off")
    found = ctypes.CDLL(chosen or str(usual))
    if not found.hf_supported():
        raise OSError("this processor lacks AVX2, FMA or F16C")
    if (abi := found.hf_abi()) != ABI:
        raise OSError(f"it is of version {abi}, not {ABI}: install hf_flash again")
    wanted, sizes = [ctypes.sizeof(structure) for structure in STRUCTURES], (ctypes.c_int64 * 64)()
    if (found_sizes := sizes[: found.hf_sizes(sizes)]) != wanted:
        raise OSError(f"its structures take {found_sizes} bytes, not {wanted}: install hf_flash again")
    return found


def _declare(found: ctypes.CDLL) -> None:
    """Declare the argument and return types of its functions."""
    found.hf_up.argtypes = found.hf_down.argtypes = [ctypes.POINTER(TokenJob)]
    found.hf_several_up.argtypes = found.hf_several_down.argtypes = [ctypes.POINTER(TokensJob)]
    found.hf_several_nonzero.argtypes, found.hf_several_nonzero.restype = [ctypes.POINTER(TokensJob)], _long
    found.hf_count_uses.argtypes = [_pointer, _long, _long, _int, _pointer, _pointer]
    found.hf_multiply.argtypes = [ctypes.POINTER(ProductJob)]
    found.hf_linear.argtypes = found.hf_decode.argtypes = [ctypes.POINTER(LinearJob)]
    found.hf_linears.argtypes = [ctypes.POINTER(LinearsJob)]
    found.hf_attention.argtypes = [ctypes.POINTER(AttentionJob)]
    found.hf_quantize.argtypes = [ctypes.POINTER(QuantizeJob)]
    found.hf_copy.argtypes = [ctypes.POINTER(CopyJob)]
    found.hf_step.argtypes = [ctypes.POINTER(Step)]
    found.hf_expert_step.argtypes = [ctypes.POINTER(ExpertStep)]
    found.hf_expert_settle.argtypes = [ctypes.POINTER(ExpertStep)]
    found.hf_expert_ahead.argtypes, found.hf_expert_ahead.restype = [ctypes.POINTER(ExpertStep)], _long
    found.hf_expert_gate.argtypes = [ctypes.POINTER(ExpertGate), _pointer, _pointer, _long, _long, _int]
    found.hf_reader_open.argtypes, found.hf_reader_open.restype = [_int, _int, _pointer], _pointer
    found.hf_reader_has_ring.argtypes = found.hf_reader_close.argtypes = [_pointer]
    found.hf_read_start.argtypes, found.hf_read_start.restype = [_pointer, _pointer, ctypes.POINTER(Order)], _long
    found.hf_read_wait.argtypes, found.hf_read_settle.argtypes = [_pointer, _long], [_pointer, _int]


@lru_cache
def loaded() -> ctypes.CDLL | None:
    """The compiled part, ready for calls; `None` if it cannot be loaded. It ignores [`switched_off`].

    Use [`library`] to decide who computes, and this function for the calls that follow from the decision.
    """
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
    if start is not None and number is not None:  # torch's own OpenMP, whose symbols are global
        found.hf_use_threads_of(start, number)
    _declare(found)
    return found


_off_lock = Lock()
_times_off = 0  # blocks of `switched_off` that are entered and not left


def library() -> ctypes.CDLL | None:
    """The compiled part; `None` if there is none, or if it is switched off."""
    return None if _times_off else loaded()


@contextmanager
def switched_off() -> Iterator[None]:
    """Do without the compiled part inside the block, in all threads of this process.

    Models, readers and predictors made inside the block keep to torch and Python. Those made before go on as they were made,
    except for choices that are made anew for every call. So load a model inside the block, and use it there. Blocks may be
    nested, and entered by several threads: the compiled part is on again when all have left.

    ```python
    with switched_off():
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FlashOffloadConfig())
        model.generate(**inputs)
    ```
    """
    global _times_off
    with _off_lock:
        _times_off += 1
    try:
        yield
    finally:
        with _off_lock:
            _times_off -= 1


def try_ring() -> int:
    """Whether this process may use io_uring: 0, or the errno that tells why not."""
    compiled = library()
    return errno.ENOSYS if compiled is None else int(compiled.hf_try_ring())


# --- threads


def threads() -> int:
    """How many threads the compiled part computes on: as many as torch."""
    return torch.get_num_threads()


def release_threads() -> bool:
    """End the OpenMP threads of the calling thread, before a fork; returns whether that is possible.

    A forked process has none of them, but would wait for them. The next computation starts new ones.
    """
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    return pause is not None and pause(_SOFTLY) == 0
