"""Calibration of a mixture of experts: how often experts are used again, measured on text. Nothing is trained.

The model runs over windows of the text as over prompts: each expert is read once for many tokens. The rule of the slots is then
applied to the routers' choices, for every number of slots at once: an expert is in memory if fewer others than there are slots
were used after it (Mattson's stack distance; runtime/expert_slots.py has the rule). The first half of a window stands for a
prompt and only fills the slots; the second half stands for the tokens decoded after it, and is counted.
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

SAMPLES: Final = 16  # windows
_AT_ONCE: Final = 4096  # tokens in a call of the model: for each, a few hidden states are in memory


class LayerHits:
    """Counts how often the experts of one layer would have been found in its slots.

    Args:
        experts: number of experts in the layer.
    """

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self._last: Ids = np.zeros(experts, np.int64)  # the last token that used each expert, from 1 on; 0: none
        self._clock = 0  # tokens seen
        self._deep: Ids = np.zeros(experts + 1, np.int64)  # number of uses that n + 1 slots or more turn into hits; last: never
        self._again = 0  # uses of experts that the token before had used as well

    def add(self, window: Ids) -> None:
        """Process the tokens of a window, and count the uses in its second half.

        Args:
            window: int64 [tokens, k], the experts of each token. Indices outside the layer's experts do not count.
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
        """Uses of experts by the counted tokens."""
        return int(self._deep.sum())

    def found(self) -> LayerRouting:
        """The shares. There must be at least one use."""
        hits = np.concatenate([[0], self._deep[:-1].cumsum()]) / self.uses
        return LayerRouting(self._again / self.uses, tuple(hits.tolist()))


def calibrate_mixture(
    mixture: Any, folder: Path, text: Text, samples: int | None, context: int | None, seed: int, memory_budget: int | str | None
) -> dict[str, Any]:
    """Measure how often a mixture's experts are used again, and write `flash-routing.json` into its folder.

    Args:
        mixture: the model in the folder, on the meta device.
        folder, text, samples, context, seed, memory_budget: as in [`hf_flash.calibrate`].

    Returns:
        The contents of that file, as [`Routing.to_dict`] returns them.

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
    """A context in which the routers' choices are counted. Yields the progress bar, which counts tokens times layers.

    Raises:
        UnsupportedModelError: the experts of a layer do not see every token.
    """

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
