"""Which predictor a model gets: one table of the kinds that `FlashOffloadConfig(predictor=...)` can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from hf_flash.config import FlashOffloadConfig
from hf_flash.errors import StoreMissingError, UnsupportedModelError
from hf_flash.families.base import Family
from hf_flash.predictors.base import PredictorFormat
from hf_flash.predictors.lowrank import LowRankFormat
from hf_flash.predictors.quantized import QuantizedFormat, quantized_formats
from hf_flash.store.layout import FlashStore


@dataclass(frozen=True)
class PredictorKind:
    """One kind of predictor.

    Attributes:
        from_weights: the format that a wish means, where it can be made from weights alone; `None`: it has to be trained.
        in_store: the formats of this kind that a store has.
        exact: whether it names every neuron, so that the activation need not leave zeros.
    """

    from_weights: Callable[[FlashOffloadConfig], QuantizedFormat | None] | None
    in_store: Callable[[FlashStore], Sequence[PredictorFormat]]
    exact: bool = False


def _quantized(wish: FlashOffloadConfig) -> QuantizedFormat:
    return QuantizedFormat(wish.predictor_bits, wish.predictor_group_size, wish.predictor_margin)


def _low_rank(store: FlashStore) -> list[LowRankFormat]:
    found = LowRankFormat.of(store)
    return [] if found is None else [found]


PREDICTORS: Final[Mapping[str, PredictorKind]] = {
    "none": PredictorKind(lambda wish: None, lambda store: [], exact=True),
    "quantized": PredictorKind(_quantized, quantized_formats),
    "lowrank": PredictorKind(None, _low_rank),
}
"""By name."""


def formats_in(store: FlashStore) -> list[PredictorFormat]:
    """All predictors that a store has."""
    return [fmt for kind in PREDICTORS.values() for fmt in kind.in_store(store)]


def stored_format(wish: FlashOffloadConfig, family: Family, config: Any, store: FlashStore) -> PredictorFormat | None:
    """The predictor of a store that a wish means; `None` for none.

    Raises:
        StoreMissingError: one that has to be trained was asked for, and the store has none.
        UnsupportedModelError: as [`fresh_format`].
    """
    kind = PREDICTORS[wished(wish, family, config)]
    if kind.from_weights is not None:
        return fresh_format(wish, family, config)
    found = kind.in_store(store)
    if not found:
        raise _untrained(wish)
    return found[0]


def fresh_format(wish: FlashOffloadConfig, family: Family, config: Any) -> QuantizedFormat | None:
    """The predictor to make from a plain checkpoint, a [`QuantizedFormat`]; `None` for none.

    Raises:
        UnsupportedModelError: a predictor was asked for and the activation leaves no exact zeros.
        StoreMissingError: a predictor that has to be trained was asked for.
    """
    kind = PREDICTORS[wished(wish, family, config)]
    if kind.from_weights is None:
        raise _untrained(wish)
    activation = family.activation_of(config)
    if not (kind.exact or activation.zeros):
        raise UnsupportedModelError(
            "a predictor needs an activation that leaves exact zeros",
            where=family.activation_key,
            expected="relu",
            got=activation.name,
            hint='use predictor="none"',
        )
    return kind.from_weights(wish)


def wished(wish: FlashOffloadConfig, family: Family, config: Any) -> str:
    """The name of the kind that a wish means. Unset: `"quantized"` where the activation leaves zeros, else `"none"`."""
    return str(wish.predictor or ("quantized" if family.activation_of(config).zeros else "none"))


def stored_choice(fmt: PredictorFormat | None) -> Mapping[str, Any]:
    """The arguments of `FlashOffloadConfig` that find a predictor again."""
    return {"predictor": "none"} if fmt is None else fmt.arguments


def _untrained(wish: FlashOffloadConfig) -> StoreMissingError:
    return StoreMissingError(
        "the low-rank predictor is trained on text, and that has not been done for this model",
        where=f"predictor={wish.predictor!r}",
        hint="repack the model into a folder, run `hf-flash calibrate FOLDER --text FILE`, then load that folder",
    )
