"""The context of a model: how many positions it has, and whether a prompt leaves one of them free."""

from __future__ import annotations

from typing import Any

from hf_flash.errors import ConfigError
from hf_flash.families.base import longest_sequence


def context_length(model: Any) -> int:
    """Return how many positions the model has, for the prompt and the answer together."""
    return longest_sequence(model.config)


def count_tokens(processor: Any, texts: list[str]) -> int:
    """Count the tokens of texts, joined by line breaks, with the model's tokenizer."""
    return len(getattr(processor, "tokenizer", processor)("\n".join(texts)).input_ids)


def check_length(length: int, context: int) -> None:
    """Refuse a prompt that leaves no position for an answer.

    Args:
        length: tokens of the prompt.
        context: positions of the model.

    Raises:
        ConfigError: it is too long.
    """
    if length >= context:
        raise ConfigError("the prompt is too long for the model", expected=f"fewer than {context} tokens", got=length)
