"""Calibration of a mixture of experts: how often experts are used again, measured on text. Nothing is trained.

The model runs over windows of the text, as over prompts: each expert is read once for many tokens. What the routers say is put
through the rule of the slots, for every number of slots at once: an expert is in memory if fewer others than there are slots
were used after it (Mattson's stack distance; runtime/expert_slots.py has the rule). The first half of a window fills the slots,
as a prompt does, and only the second half is counted, as what is decoded after it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from huggingface_hub.utils import tqdm

from hf_flash.base.arrays import Ids
from hf_flash.budget.routing import LayerRouting, Routing, check_writable, write_routing
from hf_flash.calibration.settings import check_ranges
from hf_flash.calibration.text import Text, text_name, token_windows
from hf_flash.config import FlashOffloadConfig
from hf_flash.errors import UnsupportedModelError
from hf_flash.families.base import longest_sequence
from hf_flash.runtime.experts import FlashExperts
from hf_flash.runtime.model import close

SAMPLES: Final = 16
_AT_ONCE: Final = 4096  # tokens: of each, some hidden states are in memory


class LayerHits:
    """Counts what the slots of one layer would have hit.

    Args:
        experts: of the layer.
    """

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self._last: Ids = np.zeros(experts, np.int64)  # the token that used each expert last, from 1 on
        self._clock = 0
        self._deep: Ids = np.zeros(experts + 1, np.int64)  # uses, by how many slots make them hits, less one; the last: by none
        self._again = 0  # uses of experts that the token before used

    def add(self, window: Ids) -> None:
        """Follow the tokens of a window, and count those of its second half.

        Args:
            window: int64 [tokens, k], the experts of each. What is not among them does not count.
        """
        for number, named in enumerate(window):
            used = np.unique(named[(named >= 0) & (named < self._experts)])
            if 2 * number >= len(window):
                rank = np.empty(self._experts, np.int64)
                rank[np.argsort(-self._last, kind="stable")] = np.arange(self._experts)
                depth = np.where(self._last[used] > 0, rank[used], self._experts)
                self._deep += np.bincount(depth, minlength=self._experts + 1)
                self._again += int((self._last[used] == self._clock).sum()) if self._clock else 0
            self._clock += 1
            self._last[used] = self._clock

    @property
    def uses(self) -> int:
        """Of experts, by the tokens that were counted."""
        return int(self._deep.sum())

    def found(self) -> LayerRouting:
        """The shares, if there were any uses."""
        hits = np.concatenate([[0], self._deep[:-1].cumsum()]) / self.uses
        return LayerRouting(self._again / self.uses, tuple(hits.tolist()))


def calibrate_mixture(
    mixture: Any, folder: Path, text: Text, samples: int | None, context: int | None, seed: int, memory_budget: int | str | None
) -> dict[str, Any]:
    """Measure how often a mixture's experts are used again, and write that into its folder as `flash-routing.json`.

    Args:
        mixture: the model in the folder, without memory.
        folder, text, samples, context, seed, memory_budget: as in [`hf_flash.calibrate`].

    Returns:
        What was written, as [`Routing.to_dict`] has it.

    Raises:
        CalibrationError, ConfigError, BudgetError, StoreError: as in [`hf_flash.calibrate`].
        RepackError: the folder cannot be written.
        UnsupportedModelError: the experts of a layer do not see every token, or none.
    """
    windows = _windows(mixture.config.get_text_config(), folder, text, samples, context, seed)
    check_writable(folder)
    quantization = FlashOffloadConfig(memory_budget=memory_budget)
    model = type(mixture).from_pretrained(folder, quantization_config=quantization, dtype="auto").eval()
    try:
        layers = [module for module in model.modules() if isinstance(module, FlashExperts)]
        counts = [LayerHits(layer.layer.experts) for layer in layers]
        with _listening(layers, counts, windows.shape[1]) as bar, torch.no_grad():
            bar.reset(total=windows.numel() * len(layers))
            for batch in torch.split(windows, max(1, _AT_ONCE // windows.shape[1])):
                model.base_model(input_ids=batch, use_cache=False)
        for layer, count in zip(layers, counts, strict=True):
            if not count.uses:
                raise UnsupportedModelError("no token uses the experts of this layer", where=layer.layer.name)
    finally:
        close(model)
    found = Routing(
        text=text_name(text),
        sha256=hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        tokens=windows.numel(),
        counted=len(windows) * (windows.shape[1] // 2),
        layers=tuple(layer.found() for layer in counts),
    )
    write_routing(folder, found)
    return found.to_dict()


def _windows(config: Any, folder: Path, text: Text, samples: int | None, context: int | None, seed: int) -> torch.Tensor:
    """The text, int64 [windows, context]."""
    longest = longest_sequence(config)
    samples, context = SAMPLES if samples is None else samples, min(256, longest) if context is None else context
    check_ranges({"samples": (samples, 1, 1 << 31), "context": (context, 2, longest), "seed": (seed, 0, 1 << 62)})
    return token_windows(folder, text, context, config.vocab_size, most=samples, seed=seed)


@contextmanager
def _listening(layers: Sequence[FlashExperts], counts: Sequence[LayerHits], context: int) -> Iterator[Any]:
    """While the block runs, count what the routers say. Yields the bar, of tokens times layers."""

    def note(count: LayerHits, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = [*args, *kwargs.values()][1]  # hidden_states, top_k_index, top_k_weights
        if len(index) % context:
            raise UnsupportedModelError("the experts of this model do not see every token", where=module.layer.name)
        for window in index.detach().to(torch.int64).numpy().reshape(-1, context, index.shape[-1]):
            count.add(window)
        bar.update(len(index))

    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(unit="token", unit_scale=True, desc="Calibrating"))
        for layer, count in zip(layers, counts, strict=True):
            stack.callback(layer.register_forward_pre_hook(partial(note, count), with_kwargs=True).remove)
        yield bar
