"""`hf-flash demo`: a small model generates with its FFN on flash, beside the stock model."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM
from transformers.utils import logging

from . import inspection
from .config import FlashOffloadConfig
from .errors import ConfigError
from .repack import repack
from .runtime import stats
from .store import FlashStore
from .text import tokenizer_of


def demo(
    source: str, prompt: str, tokens: int, *, memory_budget: int | None = None, tell: Callable[[str], None] = print
) -> dict[str, Any]:
    """Repack a model, generate with its FFN on flash, and hold both predictors against the stock model.

    Args:
        source: folder or Hub repository of a plain checkpoint, with its tokenizer.
        prompt: text to continue.
        tokens: to generate.
        memory_budget: bytes for weights in DRAM; default: what is free.
        tell: what is found, as soon as it is.

    Returns:
        `text`, `tokens_per_s`, `stock_tokens_per_s`, `stats`, and `same_tokens` as the stock model's, by predictor.

    Raises:
        ConfigError: the model has no room for so many tokens.
        CalibrationError: there is no tokenizer.
    """
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="hf-flash-demo-") as place:
        packed = repack(source, Path(place) / "packed")
        tell(f"\n{inspection.describe(inspection.facts(FlashStore.open_folder(packed)))}\n")
        tokenizer = tokenizer_of(packed)
        inputs = tokenizer(prompt, return_tensors="pt")
        model = _load(packed, FlashOffloadConfig(memory_budget=memory_budget))
        _check_room(model, inputs.input_ids.shape[1], tokens)
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
    return {"model": source, "prompt": prompt, "text": text, "tokens_per_s": tokens / seconds,
            "stock_tokens_per_s": tokens / stock_seconds, "same_tokens": same, "stats": snapshot.to_dict()}  # fmt: skip


def _load(folder: Path, config: FlashOffloadConfig) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def _check_room(model: Any, prompt: int, tokens: int) -> None:
    room = model.config.max_position_embeddings
    if prompt + tokens > room:
        raise ConfigError("more tokens than the model has room for", expected=f"at most {room - prompt} after this prompt",
                          got=tokens, hint="lower --max-new-tokens")  # fmt: skip


def _generate(model: Any, inputs: Any, tokens: int) -> tuple[list[int], float]:
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return output[0].tolist(), time.perf_counter() - start
