"""The evaluation of a mixture of experts: its perplexity and its time. Its router is part of it, so nothing is judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Group
from transformers import AutoModelForCausalLM

from hf_flash.base.sizes import format_bytes
from hf_flash.base.tables import Paragraph, facts
from hf_flash.calibration.text import Text, token_windows
from hf_flash.config import FlashOffloadConfig
from hf_flash.evaluation.measuring import perplexity, time_tokens, window_length
from hf_flash.families.base import longest_sequence
from hf_flash.runtime.model import close, runtime_of

_PROMPT: Final = 32  # tokens


def load_mixture(folder: Path, memory_budget: int | str | None, dtype: str | torch.dtype) -> Any:
    """A mixture of experts, as it is."""
    quantization = FlashOffloadConfig(memory_budget=memory_budget)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=dtype).eval()


def evaluate_mixture(
    folder: Path,
    text: Text,
    tokens: int,
    context: int | None,
    new_tokens: int,
    memory_budget: int | str | None,
    dtype: str | torch.dtype,
) -> dict[str, Any]:
    """Measure a mixture of experts on a text; arguments and errors as in [`hf_flash.evaluation.compare.evaluate`].

    Returns:
        `model`, `text`, `dtype`, `perplexity`, `ms_per_token`, `read_bytes_per_token`; plain values for JSON.
    """
    model = load_mixture(folder, memory_budget, dtype)
    longest = longest_sequence(model.config)
    context = window_length(context, longest)
    windows = token_windows(folder, text, context, model.config.get_text_config().vocab_size, most=max(1, tokens // context))
    reached, plan = perplexity(model, windows), runtime_of(model).plan
    prompt, new_tokens = windows[0, : min(_PROMPT, context - 1)], min(new_tokens, longest - _PROMPT)
    report = {
        "model": {"source": folder.name, "layers": plan.layers, "dense_bytes": plan.dense_bytes},
        "text": {"tokens": windows.numel(), "context": context},
        "dtype": str(model.dtype).removeprefix("torch."),
        "perplexity": reached,
        **time_tokens(model, prompt, new_tokens),
    }
    close(model)
    return report


def describe_mixture(report: dict[str, Any]) -> Group:
    """A report, to be printed by rich."""
    text = report["text"]
    return Group(
        Paragraph(f"{text['tokens']} tokens in windows of {text['context']}, {report['dtype']}"),
        Paragraph("A mixture of experts has a router of its own: there is no predictor to judge."),
        "",
        facts(
            [
                ("perplexity", f"{report['perplexity']:.3f}"),
                ("a token", f"{report['ms_per_token']:.1f} ms, {format_bytes(report['read_bytes_per_token'])} read"),
            ]
        ),
    )
