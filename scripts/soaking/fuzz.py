"""Damaged and hostile stores and configs: load and generate, in children with limits.

A case is right when the tokens are right, when hf_flash says what is wrong (an `HfFlashError`), or when transformers does, by
one of the errors of `STOCK`, or of `READING`, counted apart. It is wrong when the process dies or hangs, when another error
comes, above all one that passes through hf_flash, or when there are other tokens where a checksum or a check could have told.
What cannot be told is counted apart: bits of weights (`inspect --check` must find them), and a config that says something else.
"""

from __future__ import annotations

import itertools
import re
import shutil
import traceback
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import torch
from transformers import AutoModelForCausalLM

import hf_flash
from hf_flash import FlashOffloadConfig, HfFlashError
from hf_flash.store.layout import FlashStore
from tests.conftest import make_opt

from .children import Child, Figures, Say, Silent, Soak, ask
from .kill import PROMPT, QUICK, TOKENS
from .mutations import KINDS, Changes

CASES: Final = 20_000
LIMIT_S: Final = 20  # a case
BASES: Final = ("packed", "calibrated", "packed", "calibrated", "plain", "entry")  # drawn from
PACKAGE: Final = str(Path(hf_flash.__file__).parent)
# Errors of transformers and its libraries about config.json, the index and weights that say what is wrong: type, beginning.
STOCK: Final[list[tuple[str, str]]] = [
    ("OSError", r"It looks like the config file at|Error no file named|Can't load|.* does not appear to have a file named"),
    (
        "ValueError",
        r"Unrecognized model in|The checkpoint you are trying to load has model type|The model's quantization config"
        r"|dropout probability has to be between 0 and 1|OPTForCausalLM cannot be instantiated under",
    ),
    ("StrictDataclassFieldValidationError", r"Validation error for field"),
    ("StrictDataclassClassValidationError", r"Class validation error"),
    ("RuntimeError", r"You set `ignore_mismatched_sizes` to `False`"),
]
# Functions of transformers that read these files before hf_flash is asked, and whose errors are whatever Python raises.
READING: Final = {
    "_dict_from_json_file", "get_config_dict", "from_dict", "get_checkpoint_shard_files", "dot_natural_key",
    "_tensor_or_none", "_prepare_generation_config", "modeling_opt.__init__", "configuration_opt.__init__",
    "local_torch_dtype", "supports_quant_method", "output_capturing.<setcomp>",
}  # fmt: skip


def run(soak: Soak, figures: Figures) -> None:
    """The part."""
    work = soak.work / "fuzz"
    said, wrong = ask(partial(make_bases, work))
    if wrong:
        figures.fault(f"made no stores: {wrong}")
        return
    fuzz = Fuzz(work, said[0], soak)
    if soak.case is not None:
        ((outcome, what),) = run_cases(fuzz, [soak.case], work / "one")
        figures.outcomes[outcome] += 1
        base, kind, changes = fuzz.case(soak.case)
        print(f"case {soak.case} ({base}, {kind}, {', '.join(changes)}): {outcome} {what}")
        return
    total = soak.count(CASES, 20)
    shares = [range(first, total, soak.jobs) for first in range(soak.jobs)]
    drivers = [Child(partial(drive, fuzz, share, work / f"driver-{share.start}")) for share in shares]
    for driver in drivers:
        for message in driver.hear(86_400):
            figures.outcomes.update(message.get("outcomes", {}))
            for fault in message.get("faults", [f"a driver failed: {message}"]):
                figures.fault(fault)
        driver.end()


class Fuzz:
    """The files of each base, the right tokens, and how cases are drawn."""

    def __init__(self, work: Path, wanted: dict[str, list[int]], soak: Soak) -> None:
        self.work, self.wanted, self.soak = work, wanted, soak
        self.files = {base: _read(work / base) for base in set(BASES)}

    def case(self, number: int) -> tuple[str, str, Changes]:
        """Base, kind and changes of a case, by its number and the seed alone."""
        draw = self.soak.random("fuzz", number)
        base, kind = draw.choice(BASES), draw.choice(list(KINDS))
        if base == "entry" and kind in ("index", "config", "no JSON"):  # it has none of these
            kind = "metadata"
        return base, kind, KINDS[kind](self.files[base], draw)


def _read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def make_bases(work: Path, say: Say) -> None:
    """One model in four forms: plain, repacked, calibrated with neurons placed, and an entry of the flash cache."""
    make_opt(work / "plain")
    for name in ("packed", "calibrated"):
        hf_flash.repack(work / "plain", work / name, predictor="quantized")
    hf_flash.calibrate(work / "calibrated", TOKENS, **QUICK)
    answer(work / "plain", work / "cache")
    (entry,) = (path for path in (work / "cache").iterdir() if not path.name.startswith("."))
    shutil.copytree(entry, work / "entry")
    (work / "entry-name").write_text(entry.name)
    say({base: answer(work / base) for base in ("packed", "calibrated")})


@torch.no_grad()
def answer(folder: Path, cache: Path | None = None) -> list[int]:
    """The tokens of a repacked checkpoint; of a plain one, where there is a flash cache to use."""
    plain = {} if cache is None else {"quantization_config": FlashOffloadConfig(cache_dir=str(cache))}
    model = AutoModelForCausalLM.from_pretrained(folder, **plain)
    found: list[int] = model.generate(PROMPT, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0].tolist()
    return found


# --- one case ---------------------------------------------------------------------------------------------------------------


def try_case(fuzz: Fuzz, number: int, place: Path) -> tuple[str, str]:
    """Run a case in this process: its outcome, and more about it where it is wrong."""
    base, kind, changes = fuzz.case(number)
    folder = lay_out(fuzz, base, changes, place)
    try:
        repacked = base in ("packed", "calibrated")
        found = answer(folder) if repacked else answer(folder if base == "plain" else fuzz.work / "plain", place / "cache")
    except BaseException as error:  # noqa: BLE001  anything may come
        return judge_error(error)
    if found == fuzz.wanted["calibrated" if base == "calibrated" else "packed"]:
        return "right tokens", ""
    return judge_tokens(base, kind, changes, folder)


def lay_out(fuzz: Fuzz, base: str, changes: Changes, place: Path) -> Path:
    """The damaged folder."""
    shutil.rmtree(place, ignore_errors=True)
    folder = place / "cache" / (fuzz.work / "entry-name").read_text() if base == "entry" else place / base
    folder.mkdir(parents=True)
    for name, data in fuzz.files[base].items():
        change = changes.get(name, data)
        if isinstance(change, bytes):
            (folder / name).write_bytes(change)
        else:
            change(folder / name)
    return folder


def judge_error(error: BaseException) -> tuple[str, str]:
    if isinstance(error, HfFlashError):
        return "an error of ours", ""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
    name, text = type(error).__name__, (str(error).splitlines() or [""])[0]
    if not ours and any(name == kind and re.match(begin, text) for kind, begin in STOCK):
        return "an error of transformers", ""
    stock = {name for frame in frames for name in (frame.name, f"{Path(frame.filename).stem}.{frame.name}")}
    if not ours and stock & READING:
        return "an unclear error of transformers", ""
    at = ours[-1] if ours else frames[-1]
    where = f"{Path(at.filename).name}:{at.lineno} {at.name}"
    return "wrong", f"{'through hf_flash' if ours else 'not of STOCK'}, {name} at {where}: {text[:160]}"


def judge_tokens(base: str, kind: str, changes: Changes, folder: Path) -> tuple[str, str]:
    """Other tokens: could that have been told?"""
    names = set(changes)
    if kind == "bits of data":
        if base in ("plain", "entry") or FlashStore.open_folder(folder).check():
            return "other tokens by bits of weights", ""
        return "wrong", "other tokens, and --check finds nothing"
    if names <= {"config.json", "generation_config.json"}:
        return "other tokens by another config", ""
    if all(name.startswith("model") for name in names) and base == "plain":
        return "other tokens by other weights, as with stock", ""
    return "wrong", "other tokens, without a word"


# --- many cases -------------------------------------------------------------------------------------------------------------


def drive(fuzz: Fuzz, numbers: range, place: Path, say: Say) -> None:
    """Run cases one after the other; say what came of them at the end."""
    outcomes: Counter[str] = Counter()
    faults = []
    for number, (outcome, what) in zip(numbers, run_cases(fuzz, list(numbers), place), strict=True):
        if outcome == "wrong":
            base, kind, changes = fuzz.case(number)
            faults.append(f"--seed {fuzz.soak.seed} --case {number} ({base}, {kind}, {', '.join(changes)}): {what}")
        else:
            outcomes[outcome] += 1
    say({"outcomes": outcomes, "faults": faults})


def run_cases(fuzz: Fuzz, numbers: list[int], place: Path) -> Iterator[tuple[str, str]]:
    """The outcome of each case. They share a child until one kills it."""
    todo = iter(numbers)
    for first in todo:
        left = list(itertools.islice(todo, 100))
        batch = [first, *left]
        while batch:
            results, end = _batch(fuzz, batch, place)
            yield from results
            batch = batch[len(results) :]
            if batch:
                yield "wrong", end
                batch = batch[1:]


def _batch(fuzz: Fuzz, numbers: list[int], place: Path) -> tuple[list[tuple[str, str]], str]:
    """Cases in one child: the outcomes up to the one that ends it, and how it ended."""

    def work(say: Say) -> None:
        for number in numbers:
            say(try_case(fuzz, number, place))

    child, results = Child(work), []
    try:
        for message in child.hear(LIMIT_S):
            if isinstance(message, dict):
                return results, str(message)
            results.append((message[0], message[1]))
    except Silent as error:
        return results, f"hangs: {error}"
    finally:
        code = child.end()
    return results, f"the process ended with {code}"
