"""The table of embeddings: on flash where the budget is tight, in memory where it is not, and the same to everybody else."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import hf_flash
from hf_flash import StoreReadError, UsageError
from hf_flash.runtime.flash_embedding import FlashEmbedding
from hf_flash.runtime.model import runtime_of
from tests.conftest import torch_threads
from tests.runtime.test_experts import least, load, logits

NAME = "model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    with torch_threads(1):
        yield


@pytest.fixture
def tight(mixture: Any) -> tuple[Any, Any, torch.Tensor]:
    """A model whose table is on flash, the stock one, token ids."""
    folder, stock, ids = mixture("qwen3_moe")
    return load(folder, least(folder)), stock, ids


def test_it_is_in_memory_if_everything_else_is(mixture: Any) -> None:
    folder, stock, ids = mixture("qwen3_moe")
    floor, plenty = least(folder), load(folder, "1GB")
    plan = runtime_of(plenty).plan
    assert type(plenty.get_input_embeddings()) is nn.Embedding
    assert plan.table_bytes == stock.get_input_embeddings().weight.nbytes
    whole = plan.all_resident_bytes + plan.scratch_bytes + plan.window_bytes
    for budget, on_flash in ((floor, True), (whole - 1, True), (whole, False)):
        model = load(folder, budget)
        found = hf_flash.stats(model)
        assert isinstance(model.get_input_embeddings(), FlashEmbedding) == on_flash
        assert found.dram_bytes <= budget
        assert found.resident_bytes == plan.all_resident_bytes - on_flash * plan.table_bytes
        held = sum(t.nbytes for t in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
        assert held == found.resident_bytes
        assert torch.equal(logits(model, ids), logits(plenty, ids))


def test_it_gives_the_rows_of_the_table(tight: Any) -> None:
    model, stock, _ = tight
    ours, theirs = model.get_input_embeddings(), stock.get_input_embeddings()
    assert isinstance(ours, FlashEmbedding)
    for ids in (
        torch.tensor([[3, 3], [0, 127]]),
        torch.tensor(5),
        torch.arange(128).flip(0),
        torch.empty(0, 2, dtype=torch.int64),
    ):
        for kind in (torch.int64, torch.int32):
            assert torch.equal(ours(ids.to(kind)), theirs(ids.to(kind)))
    for wrong in (128, -1):
        with pytest.raises(IndexError, match="out of range"):
            ours(torch.tensor([wrong]))
    assert (ours.num_embeddings, ours.embedding_dim, ours.padding_idx) == (128, 64, theirs.padding_idx)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_rounded_as_loading_would(dtype: torch.dtype, mixture: Any) -> None:
    folder, stock, ids = mixture("qwen3_moe")
    found = load(folder, least(folder, dtype=dtype), dtype=dtype).get_input_embeddings()(ids)
    assert torch.equal(found, stock.get_input_embeddings()(ids).to(dtype))


def test_a_table_that_is_the_head_too_stays_in_memory(coverage: ModuleType, tmp_path: Path) -> None:
    stock, ids = coverage.stock_model("qwen3_moe", tmp_path / "untied")
    stock.config.tie_word_embeddings = True
    stock.tie_weights()
    stock.save_pretrained(tmp_path / "tied")
    model = load(tmp_path / "tied", least(tmp_path / "tied"))
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    torch.testing.assert_close(logits(model, ids), logits(stock, ids), rtol=1e-4, atol=1e-4)


def test_by_its_name_it_is_the_table(tight: Any, tmp_path: Path) -> None:
    model, stock, ids = tight
    weight = model.get_input_embeddings().weight
    assert (tuple(weight.shape), weight.dtype) == ((128, 64), torch.float32)
    assert torch.equal(model.state_dict()[NAME] + 0, stock.state_dict()[NAME])
    model.load_state_dict(stock.state_dict())
    with pytest.raises(UsageError, match="only read"):
        model.load_state_dict({**stock.state_dict(), NAME: stock.state_dict()[NAME] + 1})
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, ids), logits(model, ids))
    with pytest.raises(UsageError, match="dtype"):
        model.half()


def test_saved_it_is_the_checkpoint_as_it_was(mixture: Any, tight: Any, tmp_path: Path) -> None:
    folder, (model, *_) = mixture("qwen3_moe")[0], tight
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("count", [100, 140])
def test_with_another_vocabulary_it_is_in_memory(count: int, tight: Any, tmp_path: Path) -> None:
    model, stock, ids = tight
    ids, changed = ids.clamp(max=99), copy.deepcopy(stock)
    for one in (model, changed):
        assert one.resize_token_embeddings().num_embeddings == 128
        one.resize_token_embeddings(count, mean_resizing=False)
    assert type(model.get_input_embeddings()) is nn.Embedding
    torch.testing.assert_close(logits(model, ids)[..., :100], logits(changed, ids)[..., :100], rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", "1GB")
    assert again.get_input_embeddings().num_embeddings == count
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


def test_what_goes_wrong_is_an_error_that_names_it(mixture: Any, tmp_path: Path) -> None:
    folder, _, ids = mixture("qwen3_moe")
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = load(tmp_path, least(folder))
    os.utime(tmp_path / "model.safetensors", (1, 1))
    with pytest.raises(StoreReadError, match="embed_tokens"):
        logits(model, ids)
    hf_flash.close(model)
    with pytest.raises(UsageError, match="closed"):
        logits(model, ids)
