"""Looking at every token: what is seen is what the counters say, and looking changes nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.text import Text
from transformers import AutoModelForCausalLM

import hf_flash
from hf_flash import FlashOffloadConfig
from hf_flash.commands import live_view as liveview
from hf_flash.commands.live_view import LiveView, PlainView, view
from hf_flash.commands.main import main
from hf_flash.runtime.model import find_runtime
from hf_flash.runtime.observing import LayerSeen, TokenSeen, watched

PROMPT = torch.tensor([[5, 6, 7, 8, 9]])


def load(folder: Path, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=FlashOffloadConfig(**arguments))


def generate(model: Any, **more: Any) -> list[int]:
    mask = torch.ones_like(PROMPT)
    found = model.generate(PROMPT, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False, **more)
    ids: list[int] = found[0].tolist()
    return ids


@pytest.fixture(scope="module")
def least(packed: Path) -> int:
    return hf_flash.stats(load(packed, reader="direct")).minimum_bytes


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("room", [0, 20_000, 40_000, 1 << 20])
def test_what_is_seen_is_what_the_counters_say(packed: Path, least: int, room: int, lookahead: int) -> None:
    model = load(packed, memory_budget=least + room, lookahead=lookahead, reader="direct")
    runtime = find_runtime(model)
    counters, before, seen = runtime.engine.counters, [0, 0, 0], list[TokenSeen]()

    def show(token: TokenSeen) -> None:
        found = [counters.selected, counters.hits - counters.ahead_used, counters.read_bytes]
        used, reused, read_bytes = (new - old for new, old in zip(found, before, strict=True))
        before[:] = found
        seen.append(token)
        assert (token.read + token.reused, token.reused, token.read_bytes) == (used, reused, read_bytes)
        for ffn, layer in zip(runtime.ffns, token.layers, strict=True):
            assert not (layer.read & layer.reused).any()
            assert layer.resident.sum() <= ffn.window.capacity
            assert token.number == 0 or (layer.age[layer.read | layer.reused] == 0).all()

    with watched(model, show) as criterion:
        generate(model, stopping_criteria=[criterion])
    assert [token.number for token in seen] == list(range(12))
    assert [token.tokens for token in seen] == [5] + [1] * 11
    assert any(token.reused for token in seen) == (room > 0)
    assert json.loads(json.dumps(seen[3].to_dict()))["layers"][0]["read"] == seen[3].layers[0].read.sum()


def test_looking_changes_nothing_and_leaves_nothing(packed: Path) -> None:
    model = load(packed)
    with watched(model, lambda token: None) as criterion:
        looked_at = generate(model, stopping_criteria=[criterion])
    assert looked_at == generate(load(packed))
    assert not any(ffn._forward_hooks or ffn._forward_pre_hooks for ffn in find_runtime(model).ffns)


# --- the picture ---------------------------------------------------------------------------------------------------


def made(layers: int, d_ff: int, number: int = 1) -> TokenSeen:
    random, found = np.random.default_rng(number), []
    for _ in range(layers):
        resident, used = random.random(d_ff) < 0.3, random.random(d_ff) < 0.1
        age = random.integers(1, 9, d_ff) * ~used
        found.append(LayerSeen(used & ~resident, used & resident, resident | used, age))
    return TokenSeen(number, 7, 1, 3.5, 123456, 30, tuple(found))


def terminal(width: int = 80, height: int = 24, **more: Any) -> Console:
    settings: dict[str, Any] = {"force_terminal": True, "color_system": "truecolor", "_environ": {}}
    return Console(file=io.StringIO(), width=width, height=height, **settings | more)


def shown(console: Console, packed: Path) -> LiveView | PlainView:
    return view(
        console, console.print, about="a model", found=hf_flash.stats(load(packed)), prompt="Once upon", total=48,
        decode=lambda ids: " word" * len(ids),
    )  # fmt: skip


@pytest.mark.parametrize("size", [(80, 24), (200, 60), (120, 40), (60, 20)])
@pytest.mark.parametrize(("layers", "d_ff"), [(6, 1024), (32, 16384), (80, 100), (1, 7)])
def test_the_picture_fits_and_names_every_layer(packed: Path, layers: int, d_ff: int, size: tuple[int, int]) -> None:
    console = terminal(*size)
    live = shown(console, packed)
    assert isinstance(live, LiveView)
    for number in range(3):
        live._tokens.append(made(layers, d_ff, number))
    with console.capture() as capture:
        console.print(live.picture())
    lines = [Text.from_ansi(line) for line in capture.get().splitlines()]
    assert all(line.cell_len <= size[0] for line in lines)
    assert len(lines) <= size[1]
    assert any("token 2 of 47" in line.plain for line in lines)
    named = [line.plain.split()[0] for line in lines if "▀" in line.plain and line.plain[:5].strip()]
    ends = [int(end) for name in named for end in name.split("-")]
    assert (ends[0], ends[-1]) == (0, layers - 1)
    assert lines[-1].plain.rstrip().endswith("word")


def test_a_pixel_shows_what_its_neurons_did() -> None:
    none, every, age = np.zeros(8, bool), np.ones(8, bool), np.zeros(8, np.int64)
    kinds = {
        liveview._READ: LayerSeen(every, none, every, age),
        liveview._REUSED: LayerSeen(none, every, every, age),
        liveview._DRAM: LayerSeen(none, none, every, age + 100),
        liveview._FLASH: LayerSeen(none, none, none, age + 3),
    }
    for colour, layer in kinds.items():
        for count in (4, 8, 24):  # several neurons a pixel, one, a part of one
            pixels = liveview._colours(liveview._pixels(layer, count, 5), np.full(3, 0.1))
            assert pixels.shape == (count, 3)
            assert np.abs(pixels.astype(int) - colour).max() <= 4
    fading = [liveview._pixels(LayerSeen(none, none, every, age + since), 8, 5)[2, 0] for since in (1, 2, 4, 5, 9)]
    assert fading == sorted(fading, reverse=True)
    assert fading[2] > 0
    assert fading[-2:] == [0, 0]  # out of the window


@pytest.mark.parametrize("console", [
    Console(file=io.StringIO()), terminal(color_system=None), terminal(_environ={"TERM": "dumb"}), terminal(no_color=True),
])  # fmt: skip
def test_without_a_terminal_or_colours_a_token_is_a_line(packed: Path, console: Console) -> None:
    with shown(console, packed) as plain:
        assert isinstance(plain, PlainView)
        plain(made(3, 128, 0))
        plain(made(3, 128, 1))
    text = Text.from_ansi(console.file.getvalue()).plain  # type: ignore[attr-defined]
    heading, first, second = text.splitlines()[:3]
    assert heading.split()[:2] == ["token", "text"]
    assert first.startswith("prompt  ' word'")
    assert second.split()[-5:-2] == ["120.6", "KiB", "30"]


def test_demo_watch_prints_a_line_a_token_and_keeps_the_figures(
    tiny_opt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--watch", "--max-new-tokens", "6", "--json", str(tmp_path / "out.json")]
    assert main(["demo", str(tiny_opt), *arguments]) == 0
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    lines = [line.split() for line in printed.partition("  ms\n")[2].partition("\n\n")[0].splitlines()]
    assert [words[0] for words in lines] == ["prompt", "1", "2", "3", "4", "5"]
    assert [token["number"] for token in report["watched"]] == list(range(6))
    assert sum(token["read_bytes"] for token in report["watched"]) == report["stats"]["counters"]["read_bytes"]
    assert 0 < report["watched"][-1]["hit_rate"] < 1  # so little memory that neurons come and go
    assert report["same_tokens"] == {"none": True, "int4-g64": True}
