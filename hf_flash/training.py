"""Training one layer's low-rank predictor (paper: section 3.1, appendix B; lowrank.py has what comes out).

    start   the closed form that gets the pre-activations themselves as right as a rank allows. With inputs of mean m and
            covariance C = R R', the best rank-r approximation of W on real inputs keeps the r leading eigenvectors V of
            R' W' W R:  A = V' R^-1,  B = W R V.  One eigenproblem of size d_model serves every rank.
    train   signs matter, not values: logistic loss over all neurons, positives and negatives weighted to count the same
            (the paper's balanced loss), Adam, a few epochs. This cuts what is wrongly predicted by half to nine tenths.
    choose  on held-out tokens, with the 8-bit weights that will run: the threshold that finds the wanted share of the active
            neurons, and the smallest rank at which few enough inactive ones come along.

Layers do not know of each other, and a layer's result depends on its data and the seed alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import torch

from .errors import CalibrationError
from .lowrank import LowRankPredictor, lowrank_bytes, pack_lowrank
from .quantized import QuantizedFormat

_SEGMENT: Final = 16  # neighbouring tokens that stay together when tokens are shuffled: reads of some size
_BATCH: Final = 512  # tokens a step
_CHUNK: Final = 1024  # tokens scored at a time
_LEARNING_RATE: Final = 1e-2
_STEP: Final = 16  # ranks are multiples of it
_LOGIT: Final = 4.0  # standard deviation of the logits at the start


@dataclass(frozen=True)
class Targets:
    """What a predictor has to reach on held-out text.

    Args:
        recall: share of the active neurons that must be predicted.
        extra: share of the inactive neurons that may be predicted too.
        rank: take this rank in every layer; unset: the smallest that reaches `extra`.
        max_rank: the largest to try; unset: where a 4-bit quantized predictor would be smaller.
    """

    recall: float = 0.96
    extra: float = 0.07
    rank: int | None = None
    max_rank: int | None = None

    def limit(self, d_ff: int, d_model: int) -> int:
        """The largest rank that will be tried."""
        if self.rank is not None or self.max_rank is not None:
            return self.rank or self.max_rank or 0
        smaller = QuantizedFormat(4, 64).dram_bytes(1, d_ff, d_model - d_model % 2) // (d_ff + d_model)
        return max(1, min(d_model, smaller) // _STEP * _STEP or smaller)


@dataclass(frozen=True)
class Activations:
    """What one layer did on text, in files that are mapped.

    x [tokens, d_model] bfloat16: the FFN's input as a predictor sees it. bits [tokens, d_ff / 8] uint8: which neurons were
    active. The last `held_out` tokens are never trained on.
    """

    x: torch.Tensor
    bits: torch.Tensor
    d_ff: int
    held_out: int

    def active(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """bool [rows, d_ff]."""
        bits = np.unpackbits(self.bits[rows].numpy(), axis=-1, count=self.d_ff, bitorder="little")
        return torch.from_numpy(bits).bool()

    @property
    def trained_on(self) -> int:
        return len(self.x) - self.held_out

    def chunks(self, start: int, stop: int) -> Iterator[slice]:
        return (slice(at, min(at + _CHUNK, stop)) for at in range(start, stop, _CHUNK))


def pack_bits(active: torch.Tensor) -> torch.Tensor:
    """bool [tokens, n] to uint8 [tokens, n / 8], rounded up."""
    return torch.from_numpy(np.packbits(active.numpy(), axis=-1, bitorder="little"))


def training_bytes(rank: int, d_ff: int, d_model: int) -> int:
    """Memory that [`train_layer`] takes at most, in bytes."""
    matrices = 6 * d_model * d_model  # covariance, its factor, the eigenproblem and its workspace
    weights = 5 * (rank * (d_ff + d_model) + d_ff)  # with gradients, both moments of Adam, and the packed result
    batch = 4 * max(_BATCH, _CHUNK) * d_ff
    return 4 * (matrices + weights + batch)


@dataclass(frozen=True)
class LayerResult:
    """One layer's predictor and how it did on held-out tokens."""

    rank: int
    threshold: float  # logit from which a neuron is called active
    recall: float  # share of the active neurons that are predicted
    extra: float  # share of the inactive neurons that are predicted
    extra_untrained: float  # the same for the closed-form start, at the same recall
    selected: float  # predicted neurons per active neuron
    nbytes: int
    tried: dict[str, float]  # rank -> extra

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def train_layer(
    data: Activations,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    covariance: torch.Tensor,
    targets: Targets,
    epochs: int,
    seed: int,
) -> tuple[LayerResult, dict[str, torch.Tensor]]:
    """Train and choose one layer's predictor.

    Args:
        up: [d_ff, d_model], the up projection; may be memory-mapped.
        bias: [d_ff] or `None`.
        mean, covariance: of the inputs, from [`moments`].

    Returns:
        What was chosen and measured, and the tensors as [`pack_lowrank`] makes them.
    """
    start = _Start(up, bias, mean, covariance)
    tried: dict[int, tuple[LayerResult, dict[str, torch.Tensor]]] = {}

    def attempt(rank: int) -> bool:
        matrices = start.matrices(rank)
        before = _judge(data, pack_lowrank(*matrices), targets.recall)
        packed = pack_lowrank(*_train(data, matrices, epochs, seed))
        after = _judge(data, packed, targets.recall)
        packed["offset"] -= after["threshold"]
        size = lowrank_bytes(rank, data.d_ff, up.shape[1])
        result = LayerResult(rank, **after, extra_untrained=before["extra"], nbytes=size, tried={})
        tried[rank] = result, packed
        return result.extra <= targets.extra

    limit = targets.limit(*up.shape)
    rank = targets.rank or min(limit, max(_STEP, up.shape[1] // 32 // _STEP * _STEP))
    good = attempt(rank)
    while not good and rank < limit:
        rank = min(2 * rank, limit)
        good = attempt(rank)
    between = rank * 3 // 4 // _STEP * _STEP
    if good and len(tried) > 1 and between not in tried and attempt(between):
        rank = between
    result, packed = tried[rank]
    outcome = {str(r): round(found.extra, 5) for r, (found, _) in sorted(tried.items())}
    return LayerResult(**result.to_dict() | {"tried": outcome}), packed


def moments(data: Activations) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [d_model] and covariance [d_model, d_model] of the inputs that are trained on, float32.

    Raises:
        CalibrationError: NaN or infinite activations.
    """
    count, d_model = data.trained_on, data.x.shape[1]
    total, products = torch.zeros(d_model), torch.zeros(d_model, d_model)
    for rows in data.chunks(0, count):
        x = data.x[rows].float()
        total += x.sum(0)
        products.addmm_(x.T, x)
    mean = total / count
    products.div_(count).addr_(mean, mean, alpha=-1)
    if not torch.isfinite(products).all():
        raise CalibrationError(
            "the activations contain NaN or infinite values", hint="load in another dtype, or check the checkpoint"
        )
    return mean, products


class _Start:
    """The closed form, for every rank."""

    def __init__(self, up: torch.Tensor, bias: torch.Tensor | None, mean: torch.Tensor, covariance: torch.Tensor) -> None:
        d_ff, d_model = up.shape
        self._up, self._mean = up, mean
        self._bias = torch.zeros(d_ff) if bias is None else bias.float()
        ridge = 1e-5 * covariance.diagonal().mean() + torch.finfo(torch.float32).tiny
        self._factor = torch.linalg.cholesky(covariance + ridge * torch.eye(d_model))  # R
        gram = torch.zeros(d_model, d_model)
        for rows in self._blocks():
            part = up[rows].float()
            gram.addmm_(part.T, part)
        self._vectors = torch.linalg.eigh(self._factor.T @ gram @ self._factor)[1].flip(1)  # leading ones first

    def _blocks(self) -> Iterator[slice]:
        return (slice(at, at + _CHUNK) for at in range(0, self._up.shape[0], _CHUNK))

    def matrices(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A [rank, d_model], B [d_ff, rank] and offset [d_ff], scaled so that every neuron's logits spread alike."""
        vectors = self._vectors[:, :rank]
        a = torch.linalg.solve_triangular(self._factor, vectors.T.contiguous(), upper=False, left=False)
        b, offset = torch.empty(self._up.shape[0], rank), torch.empty(self._up.shape[0])
        for rows in self._blocks():
            seen = self._up[rows].float() @ self._factor
            scale = _LOGIT / seen.norm(dim=1).clamp_(min=1e-6)
            torch.mul(seen @ vectors, scale[:, None], out=b[rows])
            offset[rows] = scale * (self._bias[rows] + self._up[rows].float() @ self._mean)
        offset -= b @ (a @ self._mean)
        return a.contiguous(), b, offset


def _train(
    data: Activations, start: tuple[torch.Tensor, torch.Tensor, torch.Tensor], epochs: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Minimise the balanced logistic loss from `start`. The gradient is written out: nothing large is kept for autograd."""
    a, b, offset = (torch.nn.Parameter(t) for t in start)
    share = _active_share(data)
    adam = torch.optim.Adam([a, b, offset], lr=_LEARNING_RATE, fused=True)
    segments = data.trained_on // _SEGMENT
    size = min(_BATCH // _SEGMENT, segments)
    steps = epochs * (segments // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=max(1, steps))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(epochs):
            order = torch.randperm(segments, generator=random)
            for at in range(0, segments - size + 1, size):
                rows = (order[at : at + size, None] * _SEGMENT + torch.arange(_SEGMENT)).view(-1)
                x, active = data.x[rows].float(), data.active(rows)
                hidden = x @ a.T  # [tokens, rank]
                slope = torch.addmm(offset, hidden, b.T).sigmoid_().sub_(active.float())  # of the loss, by logit
                slope.mul_(torch.where(active, 0.5 / share, 0.5 / (1 - share))).div_(slope.numel())
                b.grad, offset.grad = slope.T @ hidden, slope.sum(0)
                a.grad = (slope @ b).T @ x
                adam.step()
                schedule.step()
    return a.detach(), b.detach(), offset.detach()


def _active_share(data: Activations) -> float:
    """Share of the neurons that are active, over the tokens that are trained on; inside (0, 1)."""
    count = sum(int(np.bitwise_count(data.bits[rows].numpy()).sum()) for rows in data.chunks(0, data.trained_on))
    total = data.trained_on * data.d_ff
    return min(max(count, 1), total - 1) / total


def _judge(data: Activations, packed: dict[str, torch.Tensor], recall: float) -> dict[str, float]:
    """The threshold that reaches `recall` on held-out tokens, and what comes along with it."""
    predictor = LowRankPredictor(packed)
    chunks = list(data.chunks(data.trained_on, len(data.x)))
    scores = torch.cat([predictor.score(data.x[rows])[data.active(rows)] for rows in chunks])
    positives = len(scores)
    if positives:
        threshold = float(scores.kthvalue(int((1 - recall) * positives) + 1).values)
        threshold -= abs(threshold) * 1e-5 + 1e-6  # `score - threshold > 0` must hold for that one too
    else:  # a silent layer
        threshold = max(float(predictor.score(data.x[rows]).max()) for rows in chunks)
    found = extra = 0
    for rows in chunks:
        selected, active = predictor.score(data.x[rows]) > threshold, data.active(rows)
        found += int((selected & active).sum())
        extra += int((selected & ~active).sum())
    return {
        "threshold": threshold,
        "recall": found / positives if positives else 1.0,
        "extra": extra / max(1, data.held_out * data.d_ff - positives),
        "selected": (found + extra) / max(1, positives),
    }
