"""`hf-flash demo`: a small model generates with its FFN on flash, beside the stock model."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hf_flash.base.folders import scratch_folder
from hf_flash.calibration.text import tokenizer_of
from hf_flash.commands import inspect as inspection
from hf_flash.commands.live_view import LiveView, view
from hf_flash.config import FlashOffloadConfig
from hf_flash.errors import ConfigError
from hf_flash.packing.repacking import repack
from hf_flash.planning.planner import needs
from hf_flash.runtime.model import stats
from hf_flash.runtime.observing import TokenSeen, watched
from hf_flash.store.layout import FlashStore

_SHOWN: Final = 0.3  # of the FFN fits, where it is to be seen how neurons come and go


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
    """Repack a model, generate with its FFN on flash, and hold both predictors against the stock model.

    Args:
        source: folder or Hub repository of a plain checkpoint, with its tokenizer.
        prompt: text to continue.
        tokens: to generate.
        memory_budget: bytes for weights in DRAM; default: what is free, or, with `watch`, so much that neurons come and go.
        watch: show what every token reads and reuses.
        pace: seconds that a token is shown at least, in a terminal.
        tell: what is found, as soon as it is.
        console: where to show tokens.

    Returns:
        `text`, `tokens_per_s`, `stock_tokens_per_s`, `stats`, and `same_tokens` as the stock model's, by predictor; with
        `watch` also `watched`, a row for every token. Speeds are of decoding and leave out the time that showing takes.

    Raises:
        ConfigError: the model has no room for so many tokens.
        CalibrationError: there is no tokenizer.
    """
    logging.disable_progress_bar()
    with scratch_folder(Path(tempfile.gettempdir()), "demo") as place:
        packed = repack(source, place / "packed")
        tell(f"\n{inspection.describe(inspection.facts(FlashStore.open_folder(packed)))}\n")
        tokenizer = tokenizer_of(packed)
        inputs = tokenizer(prompt, return_tensors="pt")
        if watch and memory_budget is None:
            memory_budget = _tight(packed)
        model = _load(packed, FlashOffloadConfig(memory_budget=memory_budget))
        _check_room(model, inputs.input_ids.shape[1], tokens)
        seen: list[TokenSeen] = []
        if watch:
            about = {"about": f"hf_flash: {Path(source).name}, token by token", "found": stats(model), "prompt": prompt,
                     "decode": lambda ids: tokenizer.decode(ids, skip_special_tokens=True), "total": tokens}  # fmt: skip
            with view(console or Console(), tell, **about) as show:
                slow = pace if isinstance(show, LiveView) else 0.0
                with watched(model, _both(seen.append, show), slow) as criterion:
                    found, _ = _generate(model, inputs, tokens, stopping_criteria=[criterion])
            seconds = sum(token.ms for token in seen) / 1e3
        else:
            _generate(model, inputs, 2)
            stats(model, reset=True)
            found, seconds = _generate(model, inputs, tokens)
        text, snapshot = tokenizer.decode(found, skip_special_tokens=True), stats(model)
        tell(f"{text}\n")
        dense = AutoModelForCausalLM.from_pretrained(source)
        _generate(dense, inputs, 2)
        stock, stock_seconds = _generate(dense, inputs, tokens)
        speed = f"{tokens / seconds:.0f}, the stock model in memory {tokens / stock_seconds:.0f}"
        tell(f"{snapshot}\n{'tokens per second':<20}{speed}\n")
        exact, _ = _generate(_load(packed, FlashOffloadConfig(memory_budget=memory_budget, predictor="none")), inputs, tokens)
    same = {"none": exact == stock, snapshot.predictor: found == stock}
    answers = ", ".join(f"{name}: {'yes' if yes else 'NO'}" for name, yes in same.items())
    tell(f"the same tokens as the stock model?  predictor {answers}")
    report = {"model": source, "prompt": prompt, "text": text, "tokens_per_s": tokens / seconds,
            "stock_tokens_per_s": tokens / stock_seconds, "same_tokens": same, "stats": snapshot.to_dict()}  # fmt: skip
    return report | ({"watched": [token.to_dict() for token in seen]} if watch else {})


def _both(first: Callable[[TokenSeen], object], second: Callable[[TokenSeen], object]) -> Callable[[TokenSeen], None]:
    def call(token: TokenSeen) -> None:
        first(token)
        second(token)

    return call


def _tight(folder: Path) -> int:
    """A budget with room for a part of the FFN."""
    found = needs(folder)
    return found.minimum_bytes + int(_SHOWN * (found.dense_bytes - found.resident_bytes))


def _load(folder: Path, config: FlashOffloadConfig) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def _check_room(model: Any, prompt: int, tokens: int) -> None:
    room = model.config.max_position_embeddings
    if prompt + tokens > room:
        raise ConfigError("more tokens than the model has room for", expected=f"at most {room - prompt} after this prompt",
                          got=tokens, hint="lower --max-new-tokens")  # fmt: skip


def _generate(model: Any, inputs: Any, tokens: int, **more: Any) -> tuple[list[int], float]:
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **more)
    return output[0].tolist(), time.perf_counter() - start
