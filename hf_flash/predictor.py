"""Predictors: which neurons a token will use (paper: section 3.1, appendix B).

    none        every neuron: the stock model
    quantized   a low-bit copy q of the up projection w stays in DRAM. Neuron i is called active when

                    q_i . x + b_i + margin * ||w_i - q_i|| * ||x|| / sqrt(d_model)  >  0

                The last term is `margin` standard deviations of what rounding does to the sum, if rounding errors and inputs
                are independent. It needs no training and no data.

A predictor sees one token at a time: what it says about a token never depends on the tokens beside it (contract C3), and a
NaN in the input selects every neuron, so that it reaches the output as in the stock model.

The store keeps plain codes, so that a file made on one machine serves on every other; torch's layout is made when loading.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F
from safetensors import safe_open

from .errors import ConfigError, StoreFormatError, StoreMissingError
from .store import FlashStore, LayerStore, TensorSpec, read_header
from .writer import predictor_metadata, write_safetensors

logger = logging.getLogger("hf_flash")

DEFAULT_MARGIN: Final = {4: 1.5, 8: 3.0}
_ROWS: Final = 1024  # rows packed or dequantized at a time
_WEIGHTS: Final = 1 << 19  # weights quantized at a time: what fits into a core's cache is three times faster
_TOKENS: Final = 256  # tokens scored at a time
_SHRINK: Final = (1.0, 0.95, 0.9, 0.85, 0.8)  # candidate scales, as shares of the full range of a group


class Predictor(Protocol):
    """Names the neurons each token uses."""

    nbytes: int

    def select(self, x: torch.Tensor) -> torch.Tensor | None:
        """bool [tokens, d_ff] for `x` [tokens, d_model], or `None`: every neuron for every token."""
        ...


class NoPredictor:
    """Every neuron for every token."""

    nbytes = 0

    def select(self, x: torch.Tensor) -> None:
        return None


@dataclass(frozen=True)
class QuantizedFormat:
    """Bits and group size of a quantized predictor, and what follows from them."""

    bits: int
    group_size: int

    @property
    def variant(self) -> str:
        """Its name in file names and metadata."""
        return f"int4-g{self.group_size}" if self.bits == 4 else "int8"

    def group(self, d_model: int) -> int:
        """Columns that share a scale: the whole row in 8 bits, else the asked group size or its part that divides."""
        return d_model if self.bits == 8 else math.gcd(self.group_size, d_model)

    def specs(self, prefix: str, d_ff: int, d_model: int) -> dict[str, TensorSpec]:
        """The tensors of one layer, in file order."""
        if self.bits == 4 and d_model % 2:
            raise ConfigError(
                "two 4-bit codes share a byte, but d_model is odd",
                where=prefix,
                got=d_model,
                hint="use predictor_bits=8",
            )
        groups = d_model // self.group(d_model)
        codes: TensorSpec = (torch.uint8, (d_ff, d_model // 2)) if self.bits == 4 else (torch.int8, (d_ff, d_model))
        zeros: dict[str, TensorSpec] = {f"{prefix}.predictor.zeros": (torch.bfloat16, (d_ff, groups))} if self.bits == 4 else {}
        return {
            f"{prefix}.predictor.codes": codes,
            f"{prefix}.predictor.scales": (torch.bfloat16, (d_ff, groups)),
            **zeros,
            f"{prefix}.predictor.error": (torch.float32, (d_ff,)),
        }

    def dram_bytes(self, d_ff: int, d_model: int) -> int:
        """What the loaded predictor of one layer holds."""
        groups = d_model // self.group(d_model)
        weights = d_ff * (d_model // 2 + 4 * groups) if self.bits == 4 else d_ff * (d_model + 2)
        return weights + 4 * d_ff  # the margins


def quantize_rows(up: torch.Tensor, form: QuantizedFormat) -> dict[str, torch.Tensor]:
    """Quantize rows of an up projection.

    4 bits: asymmetric, `w = (code - 8) * scale + zero`, per group the range with the smallest squared error.
    8 bits: symmetric, `w = code * scale`, one scale a row.

    Args:
        up: [rows, d_model], any floating dtype.

    Returns:
        `codes`, `scales`, `zeros` (4 bits) and `error`, the norm [rows] of what rounding changed, as the store keeps them.
    """
    rows, d_model = up.shape
    w = up.float().view(rows, -1, form.group(d_model))
    if form.bits == 8:
        scale = _safe_scale(w.abs().amax(-1, keepdim=True) / 127)
        code = (w / scale).round().clamp(-127, 127)
        error = (code * scale - w).view(rows, -1).norm(dim=1)
        return {"codes": code.view(rows, d_model).to(torch.int8), "scales": scale[..., 0].bfloat16(), "error": error}
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    best: tuple[torch.Tensor, ...] | None = None
    for shrink in _SHRINK:
        scale = _safe_scale((high - low) * shrink / 15)
        zero = ((high + low + scale * (high > low)) / 2).bfloat16().float()
        code = ((w - zero) / scale).round().clamp(-8, 7)
        loss = (code * scale + zero - w).square().sum(-1, keepdim=True)
        if best is None:
            best = loss, code, scale, zero
        else:
            better = loss < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip((loss, code, scale, zero), best, strict=True))
    assert best is not None
    loss, code, scale, zero = best
    nibbles = (code + 8).view(rows, d_model).to(torch.uint8)
    return {
        "codes": nibbles[:, 0::2] | nibbles[:, 1::2] << 4,
        "scales": scale[..., 0].bfloat16(),
        "zeros": zero[..., 0].bfloat16(),
        "error": loss.sum((1, 2)).sqrt(),
    }


def _safe_scale(scale: torch.Tensor) -> torch.Tensor:
    """Scales rounded to what is stored; 1 where a group is constant."""
    scale = scale.bfloat16().float()
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def write_predictor(path: Path, store: FlashStore, form: QuantizedFormat, progress: Any = iter) -> None:
    """Make the quantized predictor of every layer from the bundles on flash, one layer in memory at a time."""
    specs: dict[str, TensorSpec] = {}
    for layer in store.layers:
        specs |= form.specs(layer.prefix, layer.d_ff, layer.d_model)

    def pieces() -> Iterator[torch.Tensor]:
        for layer in progress(store.layers):
            up, rows = layer.bundles()[:, : layer.d_model], max(1, _WEIGHTS // layer.d_model)
            parts = [quantize_rows(up[at : at + rows], form) for at in range(0, layer.d_ff, rows)]
            for name in parts[0]:
                yield torch.cat([part[name] for part in parts])

    write_safetensors(path, specs, pieces(), predictor_metadata(form.variant, store.metadata["fingerprint"]))


class QuantizedPredictor:
    """The loaded form: codes in the layout that torch multiplies fast on this CPU, or plain codes where it cannot.

    Args:
        tensors: as [`quantize_rows`] returns them, for the whole layer.
        bias: [d_ff] of the up projection, or `None`. The layer's own, so that it is not held twice and may change.
        margin: standard deviations of rounding error to allow for.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None, form: QuantizedFormat, margin: float
    ) -> None:
        error = tensors["error"]
        self._bits = form.bits
        self._d_model = tensors["codes"].shape[1] * (2 if form.bits == 4 else 1)
        self._group = form.group(self._d_model)
        self._bias = torch.zeros(1, dtype=torch.float32) if bias is None else bias
        self._margin = (error * (margin / math.sqrt(self._d_model))).clone()
        if form.bits == 8:
            self._codes, self._scales = tensors["codes"].clone(), tensors["scales"].view(-1).clone()
        else:
            pairs = torch.stack([tensors["scales"], tensors["zeros"]], dim=-1)
            self._scales = pairs.transpose(0, 1).contiguous()  # [groups, d_ff, 2]
            self._codes = tensors["codes"]
        self._packed = self._pack()
        if not self._packed:
            _warn_slow(form.variant, self._d_model)
            self._codes = self._codes.clone()
        self.nbytes = sum(t.nbytes for t in (self._codes, self._scales, self._margin))

    def _pack(self) -> bool:
        """Bring the codes into torch's packed layout; whether torch can multiply them on this machine."""
        if self._bits == 8:
            return self._works(lambda: self._multiply(torch.zeros(1, self._d_model, dtype=torch.bfloat16)))
        plain = self._codes
        try:
            slices = [
                torch.ops.aten._convert_weight_to_int4pack_for_cpu(_nibbles(plain[at : at + _ROWS]), 1)
                for at in range(0, plain.shape[0], _ROWS)
            ]
        except (RuntimeError, AttributeError):
            return False
        self._codes = torch.cat(slices)
        if self._works(lambda: self._multiply(torch.zeros(1, self._d_model, dtype=torch.bfloat16))):
            return True
        self._codes = plain
        return False

    @staticmethod
    def _works(call: Any) -> bool:
        try:
            call()
        except (RuntimeError, AttributeError):
            return False
        return True

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        """`x` bfloat16 [tokens, d_model] times the packed codes: bfloat16 [tokens, d_ff]."""
        product: torch.Tensor
        if self._bits == 8:
            product = torch.ops.aten._weight_int8pack_mm(x, self._codes, self._scales)
        else:
            product = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self._codes, self._group, self._scales)
        return product

    def _multiply_plain(self, x: torch.Tensor) -> torch.Tensor:
        """The same from plain codes, some rows at a time: for shapes and machines torch has no packed layout for."""
        out = []
        for at in range(0, self._codes.shape[0], _ROWS):
            rows = slice(at, at + _ROWS)
            if self._bits == 8:
                w = self._codes[rows].float() * self._scales[rows, None].float()
            else:
                codes = (_nibbles(self._codes[rows]) - 8).float().view(-1, self._scales.shape[0], self._group)
                scale, zero = self._scales[:, rows].float().transpose(0, 1).unsqueeze(-1).unbind(2)
                w = (codes * scale + zero).view(codes.shape[0], -1)
            out.append(F.linear(x.float(), w))
        return torch.cat(out, dim=1)

    def select(self, x: torch.Tensor) -> torch.Tensor:
        parts = []
        for at in range(0, x.shape[0], _TOKENS):
            part = x[at : at + _TOKENS]
            narrow = part.bfloat16()
            score = self._multiply(narrow) if self._packed else self._multiply_plain(narrow)
            slack = torch.linalg.vector_norm(part.float(), dim=1, keepdim=True) * self._margin
            parts.append(~(score + slack + self._bias <= 0))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@lru_cache
def _warn_slow(variant: str, d_model: int) -> None:
    """Say once that torch's fast product is not to be had."""
    logger.warning(
        "hf_flash: torch has no packed %s product for d_model %d on this machine; predicting takes the slow path",
        variant,
        d_model,
    )


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, d_model / 2] to int32 [rows, d_model], 0 to 15."""
    return torch.stack([codes & 15, codes >> 4], dim=-1).view(codes.shape[0], -1).to(torch.int32)


def find_predictor(store: FlashStore, form: QuantizedFormat) -> Path:
    """The file of a predictor in a store, checked against the store it belongs to."""
    path = store.predictors.get(form.variant)
    if path is None or not path.exists():
        raise StoreMissingError(
            "the store has no such predictor",
            where=store.layers[0].path.parent,
            expected=form.variant,
            got=", ".join(store.predictors) or "none at all",
            hint="repack with this predictor, name a stored one, or load with predictor='none'",
        )
    tensors, meta = read_header(path)
    found, wanted = meta.get("hf_flash.fingerprint"), store.metadata["fingerprint"]
    if found != wanted:
        raise StoreFormatError(
            "the predictor belongs to another checkpoint",
            where=path,
            expected=f"fingerprint {wanted}",
            got=found,
            hint="repack the model",
        )
    for layer in store.layers:
        for name, spec in form.specs(layer.prefix, layer.d_ff, layer.d_model).items():
            if name not in tensors or tensors[name][0] != spec:
                raise StoreFormatError(
                    "the predictor does not fit its layer",
                    where=f"{path}: {name}",
                    expected=spec,
                    got=tensors[name][0] if name in tensors else "no such tensor",
                )
    return path


def load_quantized(
    path: Path, layer: LayerStore, bias: torch.Tensor | None, form: QuantizedFormat, margin: float
) -> QuantizedPredictor:
    """Load the predictor of one layer."""
    with safe_open(path, framework="pt") as file:
        names = form.specs(layer.prefix, layer.d_ff, layer.d_model)
        tensors = {name.rpartition(".")[2]: file.get_tensor(name) for name in names}
    return QuantizedPredictor(tensors, bias, form, margin)
