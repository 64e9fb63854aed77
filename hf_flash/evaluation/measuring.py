"""What a loaded model does by itself: its perplexity on a text, and the time a generated token takes."""

from __future__ import annotations

import math
from time import perf_counter
from typing import Any, Final

import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm

from hf_flash.errors import ConfigError
from hf_flash.runtime.counters import Counters
from hf_flash.runtime.model import stats

_BATCH: Final = 1024  # tokens through the model at a time
_LOGITS: Final = 1 << 26  # of one call, if a window does not have more


@torch.no_grad()
def window_length(asked: int | None, longest: int) -> int:
    """Tokens in a window of text: what was asked for, else 256 or the model's longest sequence if that is less.

    Raises:
        ConfigError: the model has no such windows.
    """
    context = min(256, longest) if asked is None else asked
    if not 2 <= context <= longest:
        raise ConfigError("no such window", where="context", expected=f"2 to {longest} tokens", got=context)
    return context


def perplexity(model: Any, windows: torch.Tensor) -> float:
    """exp of the mean loss of every token but the first of each window.

    Args:
        windows: token ids [windows, context].
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    step, loss = max(1, min(_BATCH, _LOGITS // vocabulary) // windows.shape[1]), 0.0
    with tqdm(total=windows.numel(), unit="token", unit_scale=True, desc="Perplexity", delay=1, leave=False) as bar:
        for batch in torch.split(windows, step):
            found = model(batch, use_cache=False).logits  # by the model itself, which may scale or cap them
            for logits, ids in zip(found, batch, strict=True):
                loss += F.cross_entropy(logits[:-1].float(), ids[1:], reduction="sum").item()
            bar.update(batch.numel())
    return math.exp(loss / (windows.numel() - len(windows)))


def time_tokens(model: Any, prompt: torch.Tensor, new_tokens: int) -> dict[str, float]:
    """Milliseconds and bytes per generated token; the prompt [tokens] is not counted."""

    def run(count: int) -> tuple[float, Counters]:
        stats(model, reset=True)
        start = perf_counter()
        model.generate(prompt[None], max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=1)
        return perf_counter() - start, stats(model).counters

    run(2)  # warm up
    (prompt_s, before), (whole_s, after) = run(1), run(new_tokens + 1)
    return {
        "ms_per_token": 1e3 * max(0.0, whole_s - prompt_s) / new_tokens,
        "predict_ms": 1e3 * max(0.0, after.predict_s - before.predict_s) / new_tokens,
        "read_bytes_per_token": (after.read_bytes - before.read_bytes) / new_tokens,
    }
