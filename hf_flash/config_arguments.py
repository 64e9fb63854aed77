"""The arguments of `FlashOffloadConfig`: one table, from which everything that names an argument is made.

The table gives `FlashOffloadConfig` its defaults, checks and docstring, `hf-flash serve` its options, `hf-flash bench
--flash-arg` its check, and docs/reference.md its table. This module imports neither torch nor transformers, so that a command
line can be checked before anything heavy is loaded.

To add an argument, add it to the table and to the signature of `FlashOffloadConfig.__init__`, and put the line that
`reference_row` returns into docs/reference.md. Tests keep the three in step.
"""

from __future__ import annotations

import difflib
import os
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from hf_flash.base.sizes import parse_bytes, parse_places
from hf_flash.errors import ConfigError

AUTO: Final = "auto"  # a memory budget that is worked out when the model is loaded

METHOD: Final = "flash"  # `quant_method` in config.json

PredictorName = Literal["quantized", "lowrank", "none"]
CopiedName = Literal["quantized", "none"]  # those that `repack` can store: made from weights alone
PredictorBits = Literal[4, 8]
ReaderName = Literal["auto", "mmap", "direct"]
UnitsOn = Literal["device", "cpu"]
MMAP: Final = "mmap"  # through the page cache
DIRECT: Final = "direct"  # past it

Check = Callable[[Any], str | None]
"""Returns what the value should have been, or `None` if it is valid. It may raise a `ConfigError` of its own instead."""


@dataclass(frozen=True)
class Argument:
    """One argument of `FlashOffloadConfig`.

    Args:
        name: what users write.
        check: what a value must be.
        types: the types, for the docstring.
        about: what it does, for the docstring.
        reference: what it does, for the table in docs/reference.md.
        option: keywords of `ArgumentParser.add_argument`, for `hf-flash serve`.
        default: the value if nobody sets one.
        default_text: the default, for the table in docs/reference.md; the value itself if left out.
        stored: whether it is written to config.json. What applies to one machine only is not.
    """

    name: str
    check: Check
    types: str
    about: str
    reference: str
    option: Mapping[str, Any] = field(repr=False)
    default: Any = None
    default_text: str | None = None
    stored: bool = True

    def is_stored(self, value: Any) -> bool:
        """Tell whether a value is written to config.json. A value that names devices is not: they are of one machine."""
        return self.stored and not isinstance(value, Mapping)

    def reference_row(self) -> str:
        """Return its line in the table of docs/reference.md."""
        shown = self.default_text or (f'`"{self.default}"`' if isinstance(self.default, str) else str(self.default))
        return f"| `{self.name}` | {shown} | {self.reference} |"

    def docstring(self) -> str:
        """Return its paragraph in the section "Args" of a docstring."""
        return textwrap.fill(
            f"{self.name} ({self.types}): {self.about}",
            width=_DOC_WIDTH,
            initial_indent=" " * 8,
            subsequent_indent=" " * 12,
            break_long_words=False,
            break_on_hyphens=False,
        )


_DOC_WIDTH: Final = 126


# --- checks ------------------------------------------------------------------------------------------------------------


def _one_of(*choices: Any) -> Check:
    def check(value: Any) -> str | None:
        valid = type(value) is type(choices[0]) and value in choices  # True is not 1, and 4.0 is not 4
        return None if valid else "one of " + ", ".join(map(repr, choices))

    return check


def _whole(low: int, high: int) -> Check:
    def check(value: Any) -> str | None:
        valid = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return None if valid else f"a whole number, {low} to {high}"

    return check


def _margin(value: Any) -> str | None:
    valid = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 100
    return None if valid else "a number of standard deviations, 0 to 100"


def _budget(value: Any) -> str | None:
    if value != AUTO and parse_places(value) is None:
        parse_bytes(value)
    return None


def _path(value: Any) -> str | None:
    return None if isinstance(value, str) else "a path"


# --- the table ---------------------------------------------------------------------------------------------------------

_TABLE: Final = (
    Argument(
        "predictor",
        _one_of(*get_args(PredictorName)),
        types='`"quantized"`, `"lowrank"` or `"none"`',
        about='names the neurons each token needs. `"quantized"`, a low-bit copy of the up projection in DRAM, and '
        '`"lowrank"`, the paper\'s predictor, which `hf_flash.calibrate` trains, need exact zeros (ReLU). `"none"` computes '
        'every neuron and equals the stock model. Unset: the stored one, else `"quantized"` for ReLU models and `"none"` for '
        "others. Paper: section 3.1.",
        default_text='the stored one, else `"quantized"` for ReLU, else `"none"`',
        reference='`"lowrank"` after `calibrate`; `"none"` gives the stock model\'s tokens, and reads everything',
        option={"choices": get_args(PredictorName), "help": "who names the neurons of a token"},
    ),
    Argument(
        "predictor_bits",
        _one_of(*get_args(PredictorBits)),
        types="`4` or `8`",
        about="width of the quantized predictor. Default 4.",
        default=4,
        reference="8 bits: hardly a wasted read, twice the memory; of a repacked model, what is stored",
        option={"type": int, "choices": get_args(PredictorBits), "help": "width of the quantized one, for a plain checkpoint"},
    ),
    Argument(
        "predictor_group_size",
        _whole(2, 1 << 16),
        types="`int`",
        about="weights that share a scale in 4 bits. Default 64; 8 bits use one scale a neuron.",
        default=64,
        reference="weights that share a scale in 4 bits",
        option={"type": int, "metavar": "N", "help": "weights that share a scale, for a plain checkpoint"},
    ),
    Argument(
        "predictor_margin",
        _margin,
        types="`float`",
        about="how many standard deviations of its own rounding error the quantized predictor adds before it calls a neuron "
        "inactive. More reads, fewer misses. Default: as measured by `hf_flash.calibrate`, else 1.5 in 4 bits, 3.0 in 8 bits.",
        default_text="as calibrated, else 1.5 (4 bits), 3.0 (8 bits)",
        reference="standard deviations of rounding error; more reads, fewer misses",
        option={"type": float, "metavar": "X", "help": "standard deviations of its rounding error"},
    ),
    Argument(
        "window",
        _whole(1, 1 << 31),
        types="`int`",
        about="neurons used by this many recent tokens stay in DRAM; older ones stay while there is room, the most used "
        "longest. Default 5. Paper: section 3.1.",
        default=5,
        reference="tokens a neuron stays for; longer while there is room",
        option={"type": int, "metavar": "N", "help": "tokens a neuron stays in DRAM for"},
    ),
    Argument(
        "lookahead",
        _whole(0, 1),
        types="`int`",
        about="how many layers ahead reading starts, on a guess that never decides what is computed: 0 not at all, 1 before "
        "the layer's own attention runs. It hides reads, at the cost of some more reads and some computing. Unset: 1 where "
        "torch leaves a core free; elsewhere only when a call used most of the previous layer, as prompts do.",
        default_text="1 where torch leaves a core free, else for prompts only",
        reference="1: reading starts before the layer's attention; 0: it never does",
        option={"type": int, "choices": [0, 1], "help": "start reading before a layer's attention"},
    ),
    Argument(
        "memory_budget",
        _budget,
        types="`int`, `str` or `dict`",
        about='ceiling on all weight bytes in memory, as bytes or text such as `"6GiB"`. On a GPU it limits the GPU\'s memory; '
        '`{"cuda:0": "8GiB", "cpu": "16GiB"}` keeps units that left the GPU in this machine\'s memory. Unset or `"auto"`: what '
        'is free, also in the cgroup; `"auto"` even if the model stores a budget.',
        default_text="what is free",
        reference='`"6GiB"` or bytes, `{"cuda:0": "8GiB", "cpu": "16GiB"}`, or `"auto"` ([budget](budget.md))',
        option={"metavar": "SIZE", "help": 'weights in memory at most, such as "6GiB"'},
    ),
    Argument(
        "units_on",
        _one_of(*get_args(UnitsOn)),
        types='`"device"` or `"cpu"`',
        about='where the units of a model on a GPU compute. `"device"`, the default: on the GPU. `"cpu"`: on this machine\'s '
        "CPU, from slots in its memory, and everything else on the GPU. Then a token crosses the bus, not experts. Not "
        "serialised.",
        default="device",
        reference='`"cpu"`: of a model on a GPU, units compute here ([on a GPU](gpu.md#units-on-the-cpu)); never stored',
        option={"choices": get_args(UnitsOn), "help": "where the units of a model on a GPU compute"},
        stored=False,
    ),
    Argument(
        "reader",
        _one_of(*get_args(ReaderName)),
        types='`"auto"`, `"mmap"` or `"direct"`',
        about='how chunks get into memory: through the page cache, or past it with O_DIRECT. Default `"auto"`.',
        default=AUTO,
        reference='`"mmap"` when the store fits in free memory, else `"direct"`',
        option={"choices": get_args(ReaderName), "help": "through the page cache or past it"},
    ),
    Argument(
        "io_threads",
        _whole(1, 256),
        types="`int`",
        about="parallel reads of the direct reader. Default 16.",
        default=16,
        reference="parallel direct reads of the compiled part where there is no io_uring, or bundles are not aligned",
        option={"type": int, "metavar": "N", "help": "parallel direct reads without io_uring"},
    ),
    Argument(
        "cache_dir",
        _path,
        types="`str` or path",
        about="where plain checkpoints are repacked to. Default `$HF_FLASH_CACHE`, else `flash` in the Hugging Face cache. "
        "Not serialised.",
        default_text="`$HF_FLASH_CACHE`, else in the Hugging Face cache",
        reference="where plain checkpoints are repacked to; never stored",
        option={"metavar": "DIR", "help": "where plain checkpoints are repacked to"},
        stored=False,
    ),
)
ARGUMENTS: Final[Mapping[str, Argument]] = {argument.name: argument for argument in _TABLE}
"""All arguments by name, in the order of the signature."""


# --- what is made from it ----------------------------------------------------------------------------------------------


def checked_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Check every name, type and value. Returns the arguments, with paths as text and full names of devices in a budget.

    Raises:
        ConfigError: an unknown argument (the message names the nearest valid one), a wrong type or value.
    """
    found = dict(arguments)
    if isinstance(found.get("cache_dir"), os.PathLike):
        found["cache_dir"] = os.fspath(found["cache_dir"])
    if (places := parse_places(found.get("memory_budget"))) is not None:
        found["memory_budget"] = places
    for name, value in found.items():
        if name not in ARGUMENTS:
            near = difflib.get_close_matches(name, ARGUMENTS, n=1)
            raise ConfigError(
                f"FlashOffloadConfig has no argument {name!r}",
                expected=f"one of {', '.join(ARGUMENTS)}",
                hint=f"did you mean {near[0]!r}?" if near else None,
            )
        if expected := ARGUMENTS[name].check(value):
            raise ConfigError(f"{name} is not valid", where="FlashOffloadConfig", expected=expected, got=repr(value))
    return found


def checked_if_set(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Like [`checked_arguments`], but `None` means that an argument is not set. An unknown name is an error with any value."""
    return checked_arguments({name: value for name, value in arguments.items() if value is not None or name not in ARGUMENTS})


def document_arguments(cls: type) -> type:
    """Class decorator that replaces the line `{arguments}` of the docstring by the paragraphs of all arguments."""
    if cls.__doc__:  # python -OO leaves docstrings out
        cls.__doc__ = cls.__doc__.replace("        {arguments}", "\n".join(argument.docstring() for argument in _TABLE))
    return cls
