"""The demonstration of `hf-flash demo`: a small model generates with its FFN on flash, then the stock model does."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console, RenderableType
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from hf_flash.base.folders import scratch_folder
from hf_flash.base.sizes import format_bytes
from hf_flash.base.tables import Figures, Paragraph, facts, printing, section
from hf_flash.calibration.text import tokenizer_of
from hf_flash.commands.live_view import LiveView, view
from hf_flash.commands.store_facts import expert_facts, expert_rows, neuron_rows
from hf_flash.commands.store_facts import facts as store_facts
from hf_flash.config import FlashOffloadConfig
from hf_flash.errors import ConfigError
from hf_flash.families.base import longest_sequence
from hf_flash.families.quantized import quantization_of
from hf_flash.packing.expert_folder import open_mixture
from hf_flash.packing.repacking import repack
from hf_flash.planning.planner import needs
from hf_flash.runtime.counters import NeuronStats
from hf_flash.runtime.model import stats
from hf_flash.runtime.observing import TokenSeen, watched
from hf_flash.store.checkpoint import resolve_folder
from hf_flash.store.layout import FlashStore

_SHOWN: Final = ("source", "kind", "FFN layers", "bundles", "predictors", "experts", "sizes")  # of what `inspect` says
_SHARE_TO_WATCH: Final = 0.3  # of the FFN fits into the budget of `watch`, so that neurons, or experts, come and go


@dataclass(frozen=True)
class Generated:
    """What a model generated."""

    ids: list[int]  # with the prompt
    seconds: float  # of decoding, without the time that showing takes
    watched: list[TokenSeen]  # one for each token, if they were watched


def demo(
    source: str,
    prompt: str,
    tokens: int,
    *,
    memory_budget: int | None = None,
    watch: bool = False,
    pace: float = 0.0,
    short_of_memory: bool = False,
    tell: Callable[[RenderableType], None],
    console: Console | None = None,
) -> dict[str, Any]:
    """Repack a model, generate with its FFN on flash, and compare the tokens of both predictors with the stock model's.

    A mixture of experts is not repacked, and needs no predictor: it is loaded as it is.

    Args:
        source: folder or Hub repository of a plain checkpoint, with its tokenizer.
        prompt: text to continue.
        tokens: to generate.
        memory_budget: bytes for weights in DRAM. Default: what is free; with `watch` or `short_of_memory`, so little that
            neurons come and go.
        watch: show what every token reads and reuses.
        pace: least time to show a token, in seconds, in a terminal.
        tell: is called with what to print as soon as there is something.
        console: where to show tokens.

    Returns:
        `text`, `tokens_per_s`, `stock_tokens_per_s`, `stats`, and `same_tokens`: by predictor, whether they are those of the
        stock model; with `watch` also `watched`, a row for every token. Speeds leave out the time that showing takes.

    Raises:
        ConfigError: the model has no room for so many tokens.
        CalibrationError: there is no tokenizer.
    """
    logging.disable_progress_bar()
    plain = resolve_folder(source)
    tokenizer = tokenizer_of(plain)
    inputs = tokenizer(prompt, return_tensors="pt")
    _check_room(AutoConfig.from_pretrained(plain), inputs.input_ids.shape[1], tokens)
    with _prepared(source, plain) as (folder, about):
        tell(section("The model", about))
        if memory_budget is None and (watch or short_of_memory):
            memory_budget = _budget_to_watch(folder)
        model = _load(folder, FlashOffloadConfig(memory_budget=memory_budget))
        if watch:
            shown = {"about": f"hf_flash: {Path(source).name}, token by token", "found": stats(model), "prompt": prompt,
                     "decode": lambda ids: tokenizer.decode(ids, skip_special_tokens=True), "total": tokens}  # fmt: skip
            with view(console or printing(), tell, **shown) as show:
                flash = _generate_watched(model, inputs, tokens, show, pace)
        else:
            flash = _generate_timed(model, inputs, tokens, lambda: stats(model, reset=True))
        text, snapshot = tokenizer.decode(flash.ids, skip_special_tokens=True), stats(model)
        tell(section("What it says", Paragraph(text)))
        stock = _generate_timed(_load_stock(source), inputs, tokens)
        speed, stock_speed = tokens / flash.seconds, tokens / stock.seconds
        same = {"none": flash.ids == stock.ids}
        if isinstance(snapshot, NeuronStats):
            config = FlashOffloadConfig(memory_budget=memory_budget, predictor="none")
            exact, _ = _generate(_load(folder, config), inputs, tokens)
            same = {"none": exact == stock.ids, snapshot.predictor: flash.ids == stock.ids}
    rows = [*snapshot.rows(), ("tokens per second", f"{speed:.0f}, the stock model in memory {stock_speed:.0f}")]
    answers = ", ".join(f"{'exact' if name == 'none' else name}: {'yes' if yes else 'NO'}" for name, yes in same.items())
    tell(section("What it took", facts([*rows, ("same tokens as stock", answers)])))
    report = {"model": source, "prompt": prompt, "text": text, "tokens_per_s": speed, "stock_tokens_per_s": stock_speed,
              "same_tokens": same, "stats": snapshot.to_dict()}  # fmt: skip
    return report | ({"watched": [token.to_dict() for token in flash.watched]} if watch else {})


def shipped_models() -> list[str]:
    """The small real models of the repository: `examples/tiny-*`, beside this package or in the current folder.

    Raises:
        ConfigError: they are not there.
    """
    for place in (Path(__file__).parents[2] / "examples", Path("examples")):
        if all((place / name / "config.json").exists() for name in _SHIPPED):
            return [str(place / name) for name in _SHIPPED]
    raise ConfigError("no model is named", where="demo", expected="a folder or a Hub repository",
                      hint="without one it shows three small models, which lie in examples/ of the repository")  # fmt: skip


def demo_shipped(models: list[str], prompt: str, tokens: int, tell: Callable[[RenderableType], None]) -> dict[str, Any]:
    """Let each of the small real models generate, and compare them in a table.

    Args:
        models: from [`shipped_models`]. prompt, tokens, tell: as in [`demo`].

    Returns:
        `models`: the report of each, and `same_tokens`, as [`demo`] has it: whether all of them gave the stock model's tokens.
    """
    reports = []
    for source in models:
        report = demo(source, prompt, tokens, short_of_memory=True, tell=lambda _: None)
        tell(section(f"{Path(source).name}: {_SHIPPED[Path(source).name]}", Paragraph(report["text"])))
        reports.append(report)
    tell(section("With a part of their weights in memory", Figures(_HEADINGS, list(map(_row, reports))), Paragraph(_WHY)))
    return {"models": reports, "same_tokens": {"none": all(report["same_tokens"]["none"] for report in reports)}}


_SHIPPED: Final = {
    "tiny-opt": "an OPT with ReLU, of whose neurons a predictor chooses a few",
    "tiny-llama": "a Llama with ReLU on its gate, which is chosen from in the same way",
    "tiny-moe": "a mixture of experts, whose router says which of them a token needs",
}
_HEADINGS: Final = ("model", "weights", "budget", "read", "hits", "tok/s", "stock", "same")
_WHY: Final = (
    "budget: memory for weights, buffers included; read: from the disk for a token; hits: of what a token uses, already in "
    "memory; stock: tokens a second of transformers with everything in memory; same: the same tokens, computed exactly.\n"
    "Models this small are not faster on flash: they fit into any memory, and a token is mostly Python. They show that the "
    "answers are right. A model that does not fit is what this is for: `hf-flash plan MODEL` says how fast yours will be."
)


def _row(report: dict[str, Any]) -> tuple[str, ...]:
    found = report["stats"]
    return (
        Path(report["model"]).name, format_bytes(found["dense_bytes"]), format_bytes(found["budget_bytes"]),
        format_bytes(found["read_bytes_per_token"]), f"{found['hit_rate']:.0%}", f"{report['tokens_per_s']:.0f}",
        f"{report['stock_tokens_per_s']:.0f}", "yes" if report["same_tokens"]["none"] else "NO",
    )  # fmt: skip


def _brief(rows: list[tuple[str, str]]) -> RenderableType:
    return facts((name, value) for name, value in rows if name in _SHOWN)


@contextmanager
def _prepared(source: str, plain: Path) -> Iterator[tuple[Path, RenderableType]]:
    """The folder to load, and what is in it: a mixture of experts as it is, everything else repacked for the time being.

    Args:
        source: the model's name, or its folder. plain: its folder.
    """
    if (mixture := open_mixture(plain)) is not None:
        yield mixture.folder, _brief(expert_rows(expert_facts(mixture)))
        return
    with scratch_folder(Path(tempfile.gettempdir()), "demo") as place:
        packed = repack(source, place / "packed")
        yield packed, _brief(neuron_rows(store_facts(FlashStore.open_folder(packed))))


def _generate_watched(model: Any, inputs: Any, tokens: int, show: Callable[[TokenSeen], object], pace: float) -> Generated:
    """Generate, and show every token; in a terminal for `pace` seconds at least."""
    seen: list[TokenSeen] = []

    def observe(token: TokenSeen) -> None:
        seen.append(token)
        show(token)

    with watched(model, observe, pace if isinstance(show, LiveView) else 0.0) as criterion:
        ids, _ = _generate(model, inputs, tokens, stopping_criteria=[criterion])
    return Generated(ids, sum(token.ms for token in seen) / 1e3, seen)


def _generate_timed(model: Any, inputs: Any, tokens: int, warmed_up: Callable[[], object] = lambda: None) -> Generated:
    """Generate twice: a little to warm up, then everything. `warmed_up` is called between the two."""
    _generate(model, inputs, 2)
    warmed_up()
    return Generated(*_generate(model, inputs, tokens), watched=[])


def _budget_to_watch(folder: Path) -> int:
    """A budget with room for a part of the FFN."""
    found = needs(folder)
    return found.minimum_bytes + int(_SHARE_TO_WATCH * (found.dense_bytes - found.resident_bytes))


def _load(folder: Path, config: FlashOffloadConfig) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def _load_stock(source: str) -> Any:
    """The plain model. A mixture may have been saved by hf_flash: its config says so, and its files are plain."""
    config = AutoConfig.from_pretrained(source)
    quantization = quantization_of(config)
    config.__dict__.pop("quantization_config", None)
    if quantization:
        config.quantization_config = quantization
    return AutoModelForCausalLM.from_pretrained(source, config=config)


def _check_room(config: Any, prompt: int, tokens: int) -> None:
    room = longest_sequence(config)
    if prompt + tokens > room:
        raise ConfigError("more tokens than the model has room for", expected=f"at most {room - prompt} after this prompt",
                          got=tokens, hint="lower --max-new-tokens")  # fmt: skip


def _generate(model: Any, inputs: Any, tokens: int, **more: Any) -> tuple[list[int], float]:
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **more)
    return output[0].tolist(), time.perf_counter() - start
