"""What a model answers, wherever it is: for tests that hold a flash model against another, or against stock."""

from __future__ import annotations

from typing import Any

import torch


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of a batch, on the CPU."""
    with torch.no_grad():
        found: torch.Tensor = model(ids.to(model.device)).logits.cpu()
    return found


def answers(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """A batch, a prompt, single tokens after one another, and a few together."""
    ids = ids.to(model.device)
    with torch.no_grad():
        first = model(ids[:1, :6], use_cache=True)
        steps, cache = [first.logits], first.past_key_values
        for at in range(6, 9):
            steps.append(model(ids[:1, at : at + 1], past_key_values=cache, use_cache=True).logits)
        steps.append(model(ids[:1, 9:], past_key_values=cache, use_cache=True).logits)
    return [logits(model, ids), *(step.cpu() for step in steps)]


def check_rounds_as_stock(flash: Any, stock: Any, ids: torch.Tensor) -> None:
    """A flash model is as far from stock in fp32 as stock in its own dtype is. `stock` is in fp32 afterwards."""
    found, wanted = logits(flash, ids), logits(stock, ids)
    assert found.dtype == wanted.dtype
    exact = logits(stock.float(), ids)
    error = (wanted.float() - exact).abs().max()
    assert (found.float() - exact).abs().max() <= 2 * error + 1e-4 * exact.abs().max()
