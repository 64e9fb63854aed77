"""Training one layer's low-rank predictor (paper: section 3.1, appendix B; predictors/lowrank.py defines the predictor).

    start   a closed form that approximates the pre-activations as well as a rank allows. With inputs of mean m and
            covariance C = R R', the best rank-r approximation of W on real inputs keeps the r leading eigenvectors V of
            R' W' W R:  A = V' R^-1,  B = W R V.  One eigenproblem of size d_model serves every rank.
    train   signs matter, not values: logistic loss over all neurons, positives and negatives weighted to count the same
            (the paper's balanced loss), Adam, a few epochs. This cuts wrong predictions by half to nine tenths.
    choose  on held-out tokens, with the 8-bit weights that will be used: the threshold that finds the wanted share of the
            active neurons, and the smallest rank at which few enough inactive ones are predicted as well.

Layers are independent, and a layer's result depends on its data and the seed alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import torch

from hf_flash.calibration.activity import CHUNK, Activations, reached_by
from hf_flash.predictors.lowrank import LowRankPredictor, lowrank_bytes, pack_lowrank
from hf_flash.store.safetensors_files import Rows

_SEGMENT: Final = 16  # neighbouring tokens that stay together when tokens are shuffled, so that reads are not too small
_BATCH: Final = 512  # tokens per step
_HOPELESS: Final = 5.0  # a start with more than this many times `extra` is not trained: training has never gained more
_LEARNING_RATE: Final = 1e-2
_STEP: Final = 16  # ranks are multiples of this
_EXACT: Final = 1024  # width up to which all eigenvectors are computed
_SPARE: Final = 32  # extra vectors to compute, so that the last ones wanted are accurate
_LOGIT: Final = 4.0  # standard deviation of the logits at the start


@dataclass(frozen=True)
class Targets:
    """What a predictor has to reach on held-out text.

    Args:
        recall: share of the active neurons that must be predicted.
        extra: share of the inactive neurons that may be predicted too.
        rank: take this rank in every layer; `None`: the smallest that reaches `extra`.
        max_rank: the largest rank to try; `None`: half of d_model, 1024 at most.
    """

    recall: float = 0.96
    extra: float = 0.07
    rank: int | None = None
    max_rank: int | None = None

    def limit(self, d_model: int) -> int:
        """The largest rank that will be tried."""
        if self.rank is not None or self.max_rank is not None:
            return self.rank or self.max_rank or 0
        return min(1024, d_model // 2 // _STEP * _STEP or max(1, d_model // 2))


def training_bytes(rank: int, d_ff: int, d_model: int) -> int:
    """The most memory that [`train_layer`] takes, in bytes."""
    matrices = 6 * d_model * d_model  # covariance, its factor, the eigenproblem and its workspace
    weights = 5 * (rank * (d_ff + d_model) + d_ff)  # with gradients, both moments of Adam, and the packed result
    batch = 4 * 1024 * d_ff  # logits, slopes and weights of a batch, or co-activation (activity.py)
    return 4 * (matrices + weights + batch)


@dataclass(frozen=True)
class LayerResult:
    """One layer's predictor and how it did on held-out tokens."""

    rank: int
    threshold: float  # logit above which a neuron is predicted to be active
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
    up: Rows | torch.Tensor,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    covariance: torch.Tensor,
    targets: Targets,
    epochs: int,
    seed: int,
) -> tuple[LayerResult, dict[str, torch.Tensor]]:
    """Train one layer's predictor, and choose its rank and threshold.

    Args:
        data: the layer's recorded activations.
        up: [d_ff, d_model], the projection that decides (up, or the gate); may be memory-mapped.
        bias: its bias [d_ff] or `None`.
        mean, covariance: of the inputs, from [`moments`].
        targets: what the predictor has to reach.
        epochs: passes over the tokens that are trained on.
        seed: for their order.

    Returns:
        What was chosen and measured, and the tensors as [`pack_lowrank`] makes them.
    """
    limit = targets.rank or targets.limit(up.shape[1])
    start = _Start(up, bias, mean, covariance, limit)
    tried: dict[int, tuple[LayerResult, dict[str, torch.Tensor]]] = {}

    def attempt(rank: int) -> bool:
        matrices = start.matrices(rank)
        plain = pack_lowrank(*matrices)
        before = _judge(data, plain, targets.recall)
        if before["extra"] > _HOPELESS * targets.extra and rank < limit:
            return False
        packed = pack_lowrank(*_train(data, matrices, epochs, seed))
        after = _judge(data, packed, targets.recall)
        if after["extra"] > before["extra"]:  # there was too little text to learn from
            packed, after = plain, before
        packed["offset"] -= after["threshold"]
        size = lowrank_bytes(rank, data.d_ff, up.shape[1])
        result = LayerResult(rank, **after, extra_untrained=before["extra"], nbytes=size, tried={})
        tried[rank] = result, packed
        return result.extra <= targets.extra

    rank = targets.rank or min(limit, max(_STEP, up.shape[1] // 32 // _STEP * _STEP))
    good = attempt(rank)
    while not good and rank < limit:
        rank = min(2 * rank, limit)
        good = attempt(rank)
    between = rank * 3 // 4 // _STEP * _STEP
    if good and rank > _STEP and targets.rank is None and between not in tried and attempt(between):
        rank = between
    result, packed = tried[rank]
    outcome = {str(r): round(found.extra, 5) for r, (found, _) in sorted(tried.items())}
    return LayerResult(**result.to_dict() | {"tried": outcome}), packed


class _Start:
    """The closed-form start, for every rank up to `limit`."""

    def __init__(
        self,
        up: Rows | torch.Tensor,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        covariance: torch.Tensor,
        limit: int,
    ) -> None:
        d_ff, d_model = up.shape
        self._up, self._mean = up, mean
        self._bias = torch.zeros(d_ff, dtype=torch.float32, device="cpu") if bias is None else bias.float()
        self._factor = _root(covariance)  # R
        gram, spread = torch.zeros(d_model, d_model, dtype=torch.float32, device="cpu"), []
        for rows in self._blocks():
            seen = up[rows].float() @ self._factor
            gram.addmm_(seen.T, seen)  # R' W' W R
            spread.append(seen.norm(dim=1))
        self._scale = _LOGIT / torch.cat(spread).clamp_(min=1e-6)
        self._vectors = _leading(gram, limit)

    def _blocks(self) -> Iterator[slice]:
        return (slice(at, at + CHUNK) for at in range(0, self._up.shape[0], CHUNK))

    def matrices(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A [rank, d_model], B [d_ff, rank] and offset [d_ff], scaled so that every neuron's logits have the same spread."""
        vectors = self._vectors[:, :rank]
        a = torch.linalg.solve_triangular(self._factor, vectors.T.contiguous(), upper=False, left=False)
        through = self._factor @ vectors
        b, offset = (
            torch.empty(self._up.shape[0], rank, dtype=torch.float32, device="cpu"),
            torch.empty(self._up.shape[0], dtype=torch.float32, device="cpu"),
        )
        for rows in self._blocks():
            part = self._up[rows].float()
            torch.mul(part @ through, self._scale[rows, None], out=b[rows])
            offset[rows] = self._scale[rows] * (self._bias[rows] + part @ self._mean)
        offset -= b @ (a @ self._mean)
        return a.contiguous(), b, offset


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """Cholesky factor of a covariance, with as much added to the diagonal as needed: few tokens do not span all dimensions."""
    ridge = 1e-5 * float(covariance.diagonal().mean()) + 1e-12
    while True:
        factor, failed = torch.linalg.cholesky_ex(
            covariance + ridge * torch.eye(len(covariance), dtype=torch.float32, device="cpu")
        )
        if not failed:
            return torch.as_tensor(factor, dtype=torch.float32, device="cpu")
        ridge *= 10


def _leading(gram: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` leading eigenvectors [n, count] of a symmetric matrix [n, n]; approximate ones if it is large."""
    if len(gram) <= _EXACT:
        exact: torch.Tensor = torch.linalg.eigh(gram)[1]
        return exact.flip(1)[:, :count]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vectors: torch.Tensor = torch.svd_lowrank(gram, q=min(len(gram), count + _SPARE), niter=4)[0]
    return vectors[:, :count]


def _train(
    data: Activations, start: tuple[torch.Tensor, torch.Tensor, torch.Tensor], epochs: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Minimise the balanced logistic loss from `start`. Gradients are computed by hand: autograd would keep large tensors."""
    a, b, offset = (torch.nn.Parameter(t) for t in start)
    share = _active_share(data)
    adam = torch.optim.Adam([a, b, offset], lr=_LEARNING_RATE, fused=True)
    weights = [0.5 / (count * _BATCH * data.d_ff) for count in (1 - share, share)]  # of inactive and of active neurons
    segments = data.trained_on // _SEGMENT
    size = max(1, min(_BATCH // _SEGMENT, segments))
    steps = epochs * (segments // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=max(1, steps))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(epochs):
            order = torch.randperm(segments, generator=random, dtype=torch.int64, device="cpu")
            for at in range(0, segments - size + 1, size):
                rows = (order[at : at + size, None] * _SEGMENT + torch.arange(_SEGMENT, dtype=torch.int64, device="cpu")).view(
                    -1
                )
                x, active = data.x[rows].float(), data.active(rows).float()
                hidden = x @ a.T  # [tokens, rank]
                slope = torch.addmm(offset, hidden, b.T).sigmoid_().sub_(active)  # derivative of the loss by each logit
                slope.mul_(active.mul_(weights[1] - weights[0]).add_(weights[0]))
                b.grad, offset.grad = slope.T @ hidden, slope.sum(0)
                a.grad = (slope @ b).T @ x
                adam.step()
                schedule.step()
    return a.detach(), b.detach(), offset.detach()


def _active_share(data: Activations) -> float:
    """Share of the neurons that are active, over the tokens that are trained on; strictly between 0 and 1."""
    count = sum(int(np.bitwise_count(data.bits[rows].numpy()).sum()) for rows in data.chunks(0, data.trained_on))
    total = data.trained_on * data.d_ff
    return min(max(count, 1), total - 1) / total


def _judge(data: Activations, packed: dict[str, torch.Tensor], recall: float) -> dict[str, float]:
    """The threshold that reaches `recall` on held-out tokens, with the recall, extra and selected neurons that it gives."""
    predictor = LowRankPredictor(packed)
    chunks = list(data.held_out_chunks)
    threshold = reached_by(recall, lambda: (predictor.score(data.x[rows])[data.active(rows)] for rows in chunks))
    if threshold is None:  # no neuron is ever active
        threshold = max(float(predictor.score(data.x[rows]).max()) for rows in chunks)
    positives, selected, found = data.judge(lambda x: predictor.score(x) > threshold)
    return {
        "threshold": threshold,
        "recall": found / positives if positives else 1.0,
        "extra": (selected - found) / max(1, data.held_out * data.d_ff - positives),
        "selected": selected / max(1, positives),
    }
