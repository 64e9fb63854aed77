"""Chooses the predictor of a model. One table has the kinds that `FlashOffloadConfig(predictor=...)` can name.

A *wish* is the user's `FlashOffloadConfig`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from hf_flash.compute.activation import WITH_ZEROS
from hf_flash.config import FlashOffloadConfig
from hf_flash.errors import StoreFormatError, StoreMissingError, UnsupportedModelError
from hf_flash.families.base import Family, Shape
from hf_flash.predictors import lowrank, quantized
from hf_flash.predictors.base import CopyFormat, PredictorFormat
from hf_flash.store.layout import FlashStore

_NUMBER: Final = "[1-9][0-9]{0,5}"  # the numbers that N stands for in the name of a variant


@dataclass(frozen=True)
class PredictorKind:
    """One kind of predictor. It is made from weights (`from_weights`) or trained (`expected`).

    Attributes:
        variants: names of its files, in metadata and in file names; N stands for any number from 1 to 999999.
        in_store: returns the formats of this kind in a store, which may also have predictors of other kinds.
        from_weights: returns the format that a wish selects, or `None` for no predictor.
        expected: returns the format that training will probably produce for models of a shape; `hf-flash plan` uses it.
        exact: whether it names every neuron, so that the activation need not leave zeros.
    """

    variants: tuple[str, ...] = ()
    in_store: Callable[[FlashStore], Sequence[PredictorFormat]] = lambda store: ()
    from_weights: Callable[[FlashOffloadConfig], CopyFormat | None] | None = None
    expected: Callable[[Shape], PredictorFormat] | None = None
    exact: bool = False

    def has_variant(self, name: str) -> bool:
        """Whether `name` is a variant of this kind."""
        return any(re.fullmatch(variant.replace("N", _NUMBER), name) for variant in self.variants)


def _quantized(wish: FlashOffloadConfig) -> CopyFormat:
    return quantized.QuantizedFormat(wish.predictor_bits, wish.predictor_group_size, wish.predictor_margin)


def _low_rank(store: FlashStore) -> list[lowrank.LowRankFormat]:
    found = lowrank.LowRankFormat.of(store)
    return [] if found is None else [found]


PREDICTORS: Final[Mapping[str, PredictorKind]] = {
    "none": PredictorKind(from_weights=lambda wish: None, exact=True),
    "quantized": PredictorKind(quantized.VARIANTS, quantized.quantized_formats, from_weights=_quantized),
    "lowrank": PredictorKind((lowrank.VARIANT,), _low_rank, expected=lowrank.expected_low_rank),
}
"""By name."""


# --- what a store has ----------------------------------------------------------------------------------------------------


def is_predictor(variant: str) -> bool:
    """Whether any kind of predictor has this variant."""
    return any(kind.has_variant(variant) for kind in PREDICTORS.values())


def check_predictors(store: FlashStore) -> None:
    """Refuse a store that has a predictor of an unknown kind.

    Raises:
        StoreFormatError: it names the predictor's file.
    """
    for variant, path in store.predictors.items():
        if not is_predictor(variant):
            known = [name for kind in PREDICTORS.values() for name in kind.variants]
            raise StoreFormatError("no such predictor", where=path, expected=", ".join(known), got=ascii(variant))


def formats_in(store: FlashStore) -> list[PredictorFormat]:
    """The formats of all predictors in a store.

    Raises:
        StoreFormatError: as [`check_predictors`].
    """
    check_predictors(store)
    return [fmt for kind in PREDICTORS.values() for fmt in kind.in_store(store)]


def copies_in(store: FlashStore) -> list[PredictorFormat]:
    """The formats of the predictors in a store that were made from weights alone."""
    return [fmt for kind in PREDICTORS.values() if kind.from_weights is not None for fmt in kind.in_store(store)]


# --- what a wish means ---------------------------------------------------------------------------------------------------


def stored_format(wish: FlashOffloadConfig, family: Family, config: Any, store: FlashStore) -> PredictorFormat | None:
    """The predictor that a wish selects for a store; `None` for no predictor.

    One made from weights may be missing in the store.

    Raises:
        StoreFormatError: as [`check_predictors`].
        StoreMissingError: the wish is for a predictor that has to be trained, and the store has none.
        UnsupportedModelError: as [`fresh_format`].
    """
    check_predictors(store)
    name = wished(wish, family, config)
    if PREDICTORS[name].from_weights is not None:
        return fresh_format(wish, family, config)
    found = PREDICTORS[name].in_store(store)
    if not found:
        raise _untrained(name)
    return found[0]


def fresh_format(wish: FlashOffloadConfig, family: Family, config: Any) -> CopyFormat | None:
    """The predictor to make from a plain checkpoint; `None` for no predictor.

    Raises:
        UnsupportedModelError: the wish is for a predictor, and the activation leaves no exact zeros.
        StoreMissingError: the wish is for a predictor that has to be trained.
    """
    name = wished(wish, family, config)
    kind = PREDICTORS[name]
    if kind.from_weights is None:
        raise _untrained(name)
    if not kind.exact:
        check_sparse(family, config)
    return kind.from_weights(wish)


def planned_format(wish: FlashOffloadConfig, family: Family, config: Any, store: FlashStore | None) -> PredictorFormat | None:
    """The predictor that a wish selects: as in the store, or as repacking or calibrating would make it.

    Raises:
        StoreFormatError, UnsupportedModelError: as [`stored_format`].
    """
    kind = PREDICTORS[wished(wish, family, config)]
    if store is not None and (kind.expected is None or kind.in_store(store)):
        return stored_format(wish, family, config, store)
    if kind.expected is None:
        return fresh_format(wish, family, config)
    check_sparse(family, config)
    return kind.expected(family.shape(config))


def check_sparse(family: Family, config: Any) -> None:
    """Refuse a model whose active neurons cannot be predicted.

    Raises:
        UnsupportedModelError: its activation leaves no exact zeros.
    """
    activation = family.activation_of(config)
    if not activation.zeros:
        raise UnsupportedModelError(
            "a predictor needs an activation that leaves exact zeros",
            where=family.activation_key,
            expected=" or ".join(WITH_ZEROS),
            got=activation.name,
            hint='use predictor="none"',
        )


def wished(wish: FlashOffloadConfig, family: Family, config: Any) -> str:
    """The name of the kind that a wish selects. If unset: `"quantized"` if the activation leaves zeros, else `"none"`."""
    return str(wish.predictor or ("quantized" if family.activation_of(config).zeros else "none"))


def stored_choice(fmt: PredictorFormat | None) -> Mapping[str, Any]:
    """The arguments of `FlashOffloadConfig` that select a predictor again."""
    return {"predictor": "none"} if fmt is None else fmt.arguments


def _untrained(name: str) -> StoreMissingError:
    return StoreMissingError(
        f"the {name} predictor is trained on text, and that has not been done for this model",
        where=f"predictor={name!r}",
        hint="repack the model into a folder, run `hf-flash calibrate FOLDER --text FILE`, then load that folder",
    )
