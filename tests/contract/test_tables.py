"""The tables are the one truth: what is written down beside them, because it must be light or typed, says the same."""

from __future__ import annotations

import argparse
from typing import Any, get_args

import pytest
import torch

from hf_flash.base import dtypes
from hf_flash.budget.demand import PREDICTED
from hf_flash.commands import run_plan, run_repack
from hf_flash.compute import activation, library
from hf_flash.config_arguments import ARGUMENTS, CopiedName, PredictorBits, PredictorName, ReaderName
from hf_flash.predictors.choice import PREDICTORS
from hf_flash.predictors.quantized import DEFAULT_MARGIN
from hf_flash.reading.reader import READERS


def test_predictors_are_those_that_a_config_can_name() -> None:
    assert set(get_args(PredictorName)) == PREDICTORS.keys()
    assert set(get_args(CopiedName)) == {name for name, kind in PREDICTORS.items() if kind.from_weights is not None}
    assert PREDICTED.keys() == {name for name, kind in PREDICTORS.items() if not kind.exact}
    assert set(get_args(PredictorBits)) == DEFAULT_MARGIN.keys()


@pytest.mark.parametrize("name", PREDICTORS)
def test_a_predictor_is_made_from_weights_or_trained(name: str) -> None:
    kind = PREDICTORS[name]
    assert (kind.from_weights is None) != (kind.expected is None)
    assert all(not other.has_variant(variant.replace("N", "64")) for variant in kind.variants
               for other_name, other in PREDICTORS.items() if other_name != name)  # fmt: skip


def test_readers_are_those_that_a_config_can_name() -> None:
    assert set(get_args(ReaderName)) == READERS.keys()


@pytest.mark.parametrize(("name", "fits", "direct"), [
    ("auto", True, False), ("auto", False, True), ("mmap", True, False), ("mmap", False, False), ("direct", True, True),
    ("direct", False, True),
])  # fmt: skip
def test_a_reader_says_when_it_reads_past_the_page_cache(name: str, fits: bool, direct: bool) -> None:
    assert READERS[name].wants_direct(100, 100 if fits else 99) == direct
    assert READERS[name].may_be_direct or not direct


def test_commands_offer_what_the_config_takes() -> None:
    def options(command: Any) -> dict[str, argparse.Action]:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        return {action.dest: action for action in parser._actions}

    planned, repacked = options(run_plan), options(run_repack)
    for name in ("predictor", "reader"):
        assert tuple(planned[name].choices or ()) == tuple(ARGUMENTS[name].option["choices"])
    assert planned["reader"].default == ARGUMENTS["reader"].default
    assert tuple(repacked["predictor_bits"].choices or ()) == tuple(ARGUMENTS["predictor_bits"].option["choices"])
    for name in ("predictor_bits", "predictor_group_size"):
        assert f"(default {ARGUMENTS[name].default})" in str(repacked[name].help)


def test_dtypes_and_activations_are_listed_once() -> None:
    assert list(library.DTYPES) == [torch.float32, torch.bfloat16, torch.float16]  # the numbers of native.h
    assert [str(dtype) for dtype in library.DTYPES] == [f"torch.{name}" for name in dtypes.DTYPES]
    assert all(activation.activation_named(name, level=0.1).zeros for name in activation.WITH_ZEROS)
