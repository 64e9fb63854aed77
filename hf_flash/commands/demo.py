"""The demonstration of `hf-flash demo`: a small model generates with its FFN on flash, then the stock model does."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from hf_flash.base.folders import scratch_folder
from hf_flash.calibration.text import tokenizer_of
from hf_flash.commands.live_view import LiveView, view
from hf_flash.commands.store_facts import describe, describe_experts, expert_facts, facts
from hf_flash.config import FlashOffloadConfig
from hf_flash.errors import ConfigError
from hf_flash.families.base import longest_sequence
from hf_flash.families.quantized import quantization_of
from hf_flash.packing.expert_folder import mixture_in, open_mixture
from hf_flash.packing.repacking import repack
from hf_flash.planning.planner import needs
from hf_flash.runtime.counters import NeuronStats
from hf_flash.runtime.model import stats
from hf_flash.runtime.observing import TokenSeen, watched
from hf_flash.store.checkpoint import resolve_folder
from hf_flash.store.layout import FlashStore

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
    tell: Callable[[str], None] = print,
    console: Console | None = None,
) -> dict[str, Any]:
    """Repack a model, generate with its FFN on flash, and compare the tokens of both predictors with the stock model's.

    A mixture of experts is not repacked, and needs no predictor: it is loaded as it is.

    Args:
        source: folder or Hub repository of a plain checkpoint, with its tokenizer.
        prompt: text to continue.
        tokens: to generate.
        memory_budget: bytes for weights in DRAM. Default: what is free; with `watch`, so little that neurons come and go.
        watch: show what every token reads and reuses.
        pace: least time to show a token, in seconds, in a terminal.
        tell: is called with each finding as soon as there is one.
        console: where to show tokens.

    Returns:
        `text`, `tokens_per_s`, `stock_tokens_per_s`, `stats`, and `same_tokens`: by predictor, whether they are those of the
        stock model; with `watch` also `watched`, a row for every token. Speeds leave out the time that showing takes.

    Raises:
        ConfigError: the model has no room for so many tokens.
        CalibrationError: there is no tokenizer.
    """
    logging.disable_progress_bar()
    with _prepared(source) as (folder, about):
        tell(f"\n{about}\n")
        tokenizer = tokenizer_of(folder)
        inputs = tokenizer(prompt, return_tensors="pt")
        if watch and memory_budget is None:
            memory_budget = _budget_to_watch(folder)
        model = _load(folder, FlashOffloadConfig(memory_budget=memory_budget))
        _check_room(model, inputs.input_ids.shape[1], tokens)
        if watch:
            shown = {"about": f"hf_flash: {Path(source).name}, token by token", "found": stats(model), "prompt": prompt,
                     "decode": lambda ids: tokenizer.decode(ids, skip_special_tokens=True), "total": tokens}  # fmt: skip
            with view(console or Console(), tell, **shown) as show:
                flash = _generate_watched(model, inputs, tokens, show, pace)
        else:
            flash = _generate_timed(model, inputs, tokens, lambda: stats(model, reset=True))
        text, snapshot = tokenizer.decode(flash.ids, skip_special_tokens=True), stats(model)
        tell(f"{text}\n")
        stock = _generate_timed(_load_stock(source), inputs, tokens)
        speed, stock_speed = tokens / flash.seconds, tokens / stock.seconds
        tell(f"{snapshot}\n{'tokens per second':<20}{speed:.0f}, the stock model in memory {stock_speed:.0f}\n")
        same = {"none": flash.ids == stock.ids}
        if isinstance(snapshot, NeuronStats):
            config = FlashOffloadConfig(memory_budget=memory_budget, predictor="none")
            exact, _ = _generate(_load(folder, config), inputs, tokens)
            same = {"none": exact == stock.ids, snapshot.predictor: flash.ids == stock.ids}
    answers = ", ".join(f"{name}: {'yes' if yes else 'NO'}" for name, yes in same.items())
    tell(f"the same tokens as the stock model?  predictor {answers}")
    report = {"model": source, "prompt": prompt, "text": text, "tokens_per_s": speed, "stock_tokens_per_s": stock_speed,
              "same_tokens": same, "stats": snapshot.to_dict()}  # fmt: skip
    return report | ({"watched": [token.to_dict() for token in flash.watched]} if watch else {})


@contextmanager
def _prepared(source: str) -> Iterator[tuple[Path, str]]:
    """The folder to load, and what is in it: a mixture of experts as it is, everything else repacked for the time being."""
    is_mixture = mixture_in(resolve_folder(source, config_only=True)) is not None
    if is_mixture and (mixture := open_mixture(resolve_folder(source))) is not None:
        yield mixture.folder, describe_experts(expert_facts(mixture))
        return
    with scratch_folder(Path(tempfile.gettempdir()), "demo") as place:
        packed = repack(source, place / "packed")
        yield packed, describe(facts(FlashStore.open_folder(packed)))


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


def _check_room(model: Any, prompt: int, tokens: int) -> None:
    room = longest_sequence(model.config)
    if prompt + tokens > room:
        raise ConfigError("more tokens than the model has room for", expected=f"at most {room - prompt} after this prompt",
                          got=tokens, hint="lower --max-new-tokens")  # fmt: skip


def _generate(model: Any, inputs: Any, tokens: int, **more: Any) -> tuple[list[int], float]:
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **more)
    return output[0].tolist(), time.perf_counter() - start
