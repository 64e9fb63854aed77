"""README.md and docs/: programs run, commands parse, links lead somewhere, tables and figures that can be worked out are right.

Programs run with the small model that is shipped in place of models on the Hub, and with the Hub of `tests/hub_server.py`. The
store format has a test of its own, tests/store/test_store_format.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig

import hf_flash
from hf_flash import BudgetError, FlashOffloadConfig, families
from hf_flash.bench.names import row_name
from hf_flash.bench.plots import wrapped
from hf_flash.commands.main import _parser
from hf_flash.config_arguments import ARGUMENTS
from hf_flash.families.base import Shape
from hf_flash.planning import planner
from hf_flash.planning.model import open_model
from hf_flash.predictors.lowrank import LowRankFormat
from hf_flash.predictors.quantized import DEFAULT_MARGIN, QuantizedFormat
from tests.conftest import ROOT, TINY_OPT, load_script
from tests.docs import PAGES, anchors, blocks, prose, tables
from tests.hub_server import Hub

README, DOCS = ROOT / "README.md", ROOT / "docs"


def every(pages: list[Path]) -> Any:
    return pytest.mark.parametrize("page", pages, ids=[page.name for page in pages])


HERE = {  # what the pages name, and what stands for it
    "facebook/opt-6.7b": str(TINY_OPT), "Qwen/Qwen3-30B-A3B": str(ROOT / "examples" / "tiny-moe"),
    "cuda": "cpu:0", "cuda:0": "cpu:0",
}  # fmt: skip


# --- programs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_place(here: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder to be in, a Hub on the loopback, and this process as it was afterwards."""
    logger, level = logging.getLogger("hf_flash"), logging.getLogger("hf_flash").level
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    logger.setLevel(level)
    hf_flash.configure(memory_budget=None, window=None)


# huggingface_hub 2.4 uploads LFS files with an argument that httpx2 no longer likes
@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
@every([page for page in PAGES if blocks(page, "python") and page.name != "store-format.md"])
def test_the_programs_of_a_page_run_one_after_the_other(
    own_place: Path, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "\n".join(blocks(page, "python"))
    for name, here in HERE.items():
        code = code.replace(f'"{name}"', repr(here))
    if "hf_flash.repack" not in code:
        hf_flash.repack(TINY_OPT, "opt-6.7b-flash")
    names: dict[str, Any] = {}
    exec(compile(code, page.name, "exec"), names)
    made = [names[name] for name in ("model", "pipe") if name in names]
    assert made or page.name in ("faq.md", "models.md")
    families._FAMILIES.pop("bamboo", None)  # what a page describes
    assert all(hf_flash.stats(model).layers == (4 if page.name == "gpu.md" else 6) for model in made)
    if page == README:
        assert hf_flash.stats(names["model"]).budget_bytes == 6 << 30
        assert capsys.readouterr().out.count("Once upon a time") == 2


def test_the_error_on_the_page_is_the_one_that_comes() -> None:
    (shown,) = [block for block in blocks(DOCS / "budget.md", "") if block.startswith("the memory budget is too small")]
    wanted = FlashOffloadConfig(memory_budget="6MiB", predictor="quantized")
    with pytest.raises(BudgetError) as caught:
        AutoModelForCausalLM.from_pretrained(TINY_OPT, quantization_config=wanted)
    assert str(caught.value) == shown.strip()


# --- commands -----------------------------------------------------------------------------------------------------------


def parsers(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command with its parser, commands of commands too."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, sub in action.choices.items():
                yield from parsers(sub, f"{name} {word}".strip())


COMMANDS = dict(parsers(_parser()))


def command_lines(page: Path) -> list[str]:
    """The lines of a page's blocks that call `hf-flash`."""
    lines = [line for block in blocks(page, "") for line in block.splitlines()]
    return [line for line in lines if line.startswith("hf-flash ")]


@every([page for page in PAGES if command_lines(page)])
def test_command_lines_parse(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in command_lines(page):
        words = shlex.split(line, comments=True)[1:]
        try:
            _parser().parse_args(words)
        except SystemExit:
            pytest.fail(f"{line}\n{capsys.readouterr().err}")


@every(PAGES)
def test_commands_and_options_that_are_spoken_of_exist(page: Path) -> None:
    spans = re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", prose(page))
    for span in spans:
        if match := re.match(r"(?:hf-flash|python -m hf_flash) ([a-z]+)", span):
            assert match[1] in COMMANDS, span
    elsewhere = "".join(path.read_text() for path in (ROOT / "scripts").iterdir() if path.is_file())
    own = {option for parser in COMMANDS.values() for action in parser._actions for option in action.option_strings}
    for option in {word for span in spans if "accelerate" not in span for word in re.findall(r"(?<!\S)--[a-z][a-z-]+", span)}:
        assert option in own or f'"{option}"' in elsewhere, option


def first_words(page: Path, head: str, pattern: str) -> list[str]:
    """What the first cells of a table name; `head`: what the table's first cell begins with."""
    (rows,) = [rows for top, rows in tables(page) if re.match(head, top[0])]
    return [re.match(pattern, row[0])[1] for row in rows]  # type: ignore[index]


def test_the_reference_has_every_command() -> None:
    named = set(first_words(DOCS / "reference.md", "command$", r"`hf-flash ([a-z]+)"))
    assert named == {name for name in COMMANDS if name and " " not in name}


def test_the_reference_has_every_function() -> None:
    named = first_words(DOCS / "reference.md", "function$", r"`hf_flash\.(\w+)\(")
    assert sorted(named) == [name for name in hf_flash.__all__ if name.islower() and callable(getattr(hf_flash, name))]


def test_the_reference_has_the_table_of_the_arguments() -> None:
    lines = (DOCS / "reference.md").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| argument of `FlashOffloadConfig` |")) + 2
    wanted = [argument.reference_row() for argument in ARGUMENTS.values()]
    assert lines[start : lines.index("", start)] == wanted
    assert f"{DEFAULT_MARGIN[4]} (4 bits), {DEFAULT_MARGIN[8]} (8 bits)" in ARGUMENTS["predictor_margin"].reference_row()


# --- links and paths ----------------------------------------------------------------------------------------------------


@every(PAGES)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert found.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(found), target


@every(PAGES)
def test_files_that_are_named_exist(page: Path) -> None:
    text = re.sub(r"https?://\S+", "", page.read_text())
    for path in re.findall(r"\b(?:scripts|examples|hf_flash|tests|docs)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path


def test_every_page_can_be_reached_from_the_readme() -> None:
    linked = {(README.parent / target).resolve() for target in re.findall(r"\]\((docs/[\w.-]+\.md)", README.read_text())}
    assert linked == {page for page in PAGES if page != README}


def test_the_readme_is_short_and_has_one_table() -> None:
    assert len(README.read_text().splitlines()) <= 120
    assert len(list(tables(README))) == 1


def test_the_table_of_the_readme_is_part_of_the_one_it_is_from() -> None:
    """The figures of one day, not of two."""
    ((_, short),) = tables(README)
    rows = {row[0]: row for _, table in tables(DOCS / "speed.md") for row in table}
    for system, speed, times, read in short:
        assert rows[system][1:3] == [speed, times], system
        assert rows[system][4].startswith(read), system


# --- charts, and the figures that they are drawn from -----------------------------------------------------------------------


def stored(name: str) -> list[dict[str, Any]]:
    """The rows of a file of docs/data."""
    rows: list[dict[str, Any]] = json.loads((DOCS / "data" / name).read_text(encoding="utf-8"))["rows"]
    return rows


def numbers(cell: str) -> list[float]:
    """The numbers of a cell of a table, in which thousands stand apart."""
    return [float(found) for found in re.findall(r"[-+]?[\d.]+", re.sub(r"(?<=\d) (?=\d{3})", "", cell))]


def test_the_table_of_decoding_has_the_figures_of_its_chart() -> None:
    (table,) = [rows for head, rows in tables(DOCS / "speed.md") if head[1:3] == ["tokens/s", "ms a token, median / p95"]]
    cells = {row[0].strip("*"): row[1:] for row in table}
    for found in stored("decode.json"):
        if found["sweep"]:
            continue
        speed, times, parts, read = cells.pop(row_name(found))
        assert numbers(speed) == [found["tokens_per_s"]]
        assert numbers(times) == [found["median_ms"], found["p95_ms"]]
        assert numbers(parts) == list(found.get("parts_ms", {}).values())
        assert not parts or sum(found["parts_ms"].values()) == pytest.approx(found["mean_ms"], abs=1.5), "parts are means"
        nbytes = found.get("read_bytes", found.get("disk_bytes"))
        unit = 1e9 if "GB" in read else 1e6
        assert numbers(read) == [x for x in (nbytes and nbytes / unit, found.get("reads")) if x]
    sweep = [found for found in stored("decode.json") if found["sweep"]]
    ((name, (speeds, times, _, read)),) = cells.items()
    assert name == f"hf_flash, {' / '.join(found['sweep'].rstrip('%') for found in sweep)} % of the weights"
    assert numbers(speeds) == [found["tokens_per_s"] for found in sweep]
    assert numbers(times) == [found["median_ms"] for found in sweep]
    assert numbers(read) == [found["read_bytes"] / 1e6 for found in sweep]


def test_the_table_of_predictors_has_the_figures_of_its_chart() -> None:
    (dense, *table), *_ = [rows for head, rows in tables(DOCS / "predictors.md") if head[1:3] == ["bytes", "selected / active"]]
    rows = stored("predictors.json")
    texts = list(dict.fromkeys(row["text"] for row in rows))
    by_text = [[row for row in rows if row["text"] == text] for text in texts]
    assert len(texts) == 2
    for line, (bible, sotu) in zip(table, zip(*by_text, strict=True), strict=True):
        kind = re.sub(r"low rank( \d+)?", r"lowrank\1", re.sub(r"^int4, groups of (\d+)", r"int4-g\1", line[0]))
        assert re.match(r"lowrank \d+|lowrank|\S+ (assumed|measured) margin", kind)[0] in bible["predictor"]  # type: ignore[index]
        assert numbers(line[1]) == [bible["bytes"] / 1024]
        assert numbers(line[2]) == [bible["selected"]]
        missed = numbers(line[3])  # one for both, or one each
        assert [100 * row["missed"] for row in (bible, sotu)] == pytest.approx([missed[0], missed[-1]])
        for row, cell, first in ((bible, line[5], dense[5]), (sotu, line[6], dense[6])):
            assert numbers(first) == [row["dense"]]
            assert numbers(cell) == pytest.approx([row["perplexity"], 100 * row["change"]])


@pytest.mark.parametrize("name", ["decode.svg", "predictors.svg"])
def test_a_chart_is_what_the_script_draws(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="it draws")
    load_script("draw_docs").draw_all(tmp_path)
    texts, drawn = (
        ["".join(text.itertext()) for text in ElementTree.parse(folder / name).iter("{http://www.w3.org/2000/svg}text")]
        for folder in (DOCS, tmp_path)
    )
    assert texts == drawn
    if name == "decode.svg":
        shown = " ".join(texts)
        for found in stored("decode.json"):
            assert all(line in texts for line in wrapped(row_name(found), 30).splitlines())
            assert f"{found['median_ms']} ({found['mean_ms']})" in shown


@pytest.mark.parametrize("chart", ["decode", "predictors"])
def test_titles_and_legends_of_charts_overlap_nothing(chart: str) -> None:
    pytest.importorskip("matplotlib", reason="it draws")
    from hf_flash.bench.drawings import bench_figure
    from hf_flash.bench.plots import style

    with style("test"):
        if chart == "decode":
            figure = bench_figure(json.loads((DOCS / "data" / "decode.json").read_text(encoding="utf-8")))
        else:
            figure = load_script("predictor_frontier").frontier(stored("predictors.json"))
        figure.draw_without_rendering()
        legend, title = figure.axes[0].get_legend().get_window_extent(), figure._suptitle.get_window_extent()
        plots = [axes.get_tightbbox() for axes in figure.axes[1:]] + [axes.get_window_extent() for axes in figure.axes]
    assert not legend.overlaps(title)
    assert not [box for box in plots if legend.overlaps(box) or title.overlaps(box)]
    assert max(legend.x1, title.x1) <= figure.bbox.x1


def test_a_margin_that_was_assumed_has_one_mark_whatever_its_size() -> None:
    kinds = load_script("predictor_frontier").kind_of
    assert (kinds("int4-g64, margin 1.5"), kinds("lowrank 32")) == ("int4-g64, assumed margin", "lowrank 32")


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.svg")), ids=lambda path: path.name)
def test_pictures_are_readable_on_light_and_on_dark_pages(path: Path) -> None:
    """The first thing that is painted is a light ground for the whole picture; and nothing is fetched from elsewhere."""
    root = ElementTree.parse(path).getroot()
    width, height = (float(x) for x in root.get("viewBox", "").split()[2:])
    first = next(item for item in root.iter() if item.tag.endswith(("}rect", "}path")))
    style = first.get("style", "") + (first.get("fill") or "")
    assert re.search("#f[0-9a-f]f[0-9a-f]f[0-9a-f]", style)
    if first.tag.endswith("}rect"):
        assert (float(first.get("width", 0)), float(first.get("height", 0))) >= (width - 4, height - 4)
    assert not re.search(r"(href|src)=\"(?!#)|url\((?!#)|@import", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["flow.svg", "idea.svg"])
def test_text_of_pictures_that_are_drawn_by_hand_stays_in_its_box(name: str) -> None:
    """Even in a font as wide as DejaVu Sans: what a page is read with is not known."""
    paths = pytest.importorskip("matplotlib.textpath", reason="it knows how wide text is")
    fonts = pytest.importorskip("matplotlib.font_manager")
    root = ElementTree.parse(DOCS / name).getroot()
    boxes = [
        [float(box.get(key, 0)) for key in ("x", "y", "width", "height")] for box in root.iter() if box.tag.endswith("}rect")
    ]
    for item in (item for item in root.iter() if item.tag.endswith("}text")):
        x, y, size = (float(item.get(key) or root.get(key) or 0) for key in ("x", "y", "font-size"))
        font = fonts.FontProperties(family="DejaVu Sans", weight=item.get("font-weight", "normal"), size=size)
        width = paths.TextPath((0, 0), item.text, prop=font).get_extents().width
        begin = x - width / 2 if item.get("text-anchor") == "middle" else x
        around = [box for box in boxes if box[0] <= x <= box[0] + box[2] and box[1] <= y <= box[1] + box[3]]
        left, top, wide, high = min(around, key=lambda box: box[2] * box[3])
        assert left < begin, item.text
        assert begin + width < left + wide, item.text
        assert top + size * 0.7 < y < top + high - 2, item.text


# --- figures that follow from the code ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json of OPT-6.7B."""
    folder: Path = tmp_path_factory.mktemp("opt-6.7b")
    sizes = {"hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384, "num_hidden_layers": 32}
    OPTConfig(vocab_size=50272, num_attention_heads=32, dtype=torch.float16, **sizes).save_pretrained(folder)
    return folder


def memory_of(shape: Path, predictor: str | None) -> Any:
    model = open_model(shape, predictor, None)
    return planner._divide(model, "6GiB", planner._demand(model, None, None, None, None), "direct")


def test_the_budget_of_the_page_is_how_it_is_divided(shape: Path) -> None:
    ((_, rows),) = [(head, rows) for head, rows in tables(DOCS / "budget.md") if head[0] == "part"]
    for column, predictor in enumerate([None, "lowrank"], start=1):
        lines = [re.split(r"\s{2,}", line) for line in memory_of(shape, predictor).describe().splitlines()]
        wanted = [size for _, size in lines]
        wanted[-1] += lines[-1][0].removeprefix("windows")
        assert [row[column] for row in rows] == wanted


def test_the_minimum_of_the_page_is_the_minimum(shape: Path) -> None:
    plans = [memory_of(shape, predictor) for predictor in (None, "lowrank")]
    gib = [f"{size / 2**30:.2f} GiB" for size in (plans[0].dense_bytes, *(plan.minimum_bytes for plan in plans))]
    text = " ".join(prose(DOCS / "faq.md").split())
    assert f"{gib[0]} of weights, the minimum is {gib[1]} with the default predictor and {gib[2]} with the low-rank one" in text


def test_the_memory_of_predictors_is_what_the_page_says() -> None:
    ((_, rows),) = [(head, rows) for head, rows in tables(DOCS / "predictors.md") if head[:2] == ["", "low rank 64"]]
    layers, sizes = 32, Shape(4096, (16384,) * 32, 32, 32, 128)
    ranks = [(64,) * layers, (128,) * layers, (128,) * 28 + (1024,) * 4, (256,) * layers, (512,) * layers]
    found = [LowRankFormat(own).dram_bytes(sizes) for own in ranks]
    found += [QuantizedFormat(bits, 64).dram_bytes(sizes) for bits in (4, 8)]
    assert rows[0][1:] == [f"{size / 2**20:.0f}" for size in found]
    weights = 2 * layers * (2 * 16384 * 4096 + 4 * 4096 * 4096)
    shares = [float(cell.rstrip(" %")) for cell in rows[1][1:]]
    assert shares == pytest.approx([100 * size / weights for size in found], abs=0.05)
