"""A bench report as one HTML file: figures, drawings and tables, light or dark as the reader's system is. It loads nothing.

It is for people who have never seen the project: what each row is, what each drawing shows, and what each column is in.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any, Final

from hf_flash._version import __version__
from hf_flash.base.sizes import format_bytes
from hf_flash.bench.drawings import bench_drawings
from hf_flash.bench.names import ROWS, row_names, setting
from hf_flash.bench.page_style import STYLE
from hf_flash.bench.report import Columns, call_names, cells, number, random_curve, step_name

_SPEED: Final[Columns] = (  # heading, field of a row or of its parts, digits, unit
    ("tokens a second", "tokens_per_s", 2, 1),
    ("mean, ms", "mean_ms", 1, 1),
    ("median, ms", "median_ms", 1, 1),
    ("95 % are below, ms", "p95_ms", 1, 1),
    ("I/O, ms", "io", 2, 1),
    ("window management, ms", "manage", 2, 1),
    ("predictor, ms", "predict", 2, 1),
    ("FFN products, ms", "compute", 2, 1),
    ("the rest, ms", "rest", 2, 1),
)
_READS: Final[Columns] = (
    ("read, MB", "bytes", 2, 1e6),
    ("reads", "reads", 0, 1),
    ("size of a read, KiB", "run_bytes", 1, 1024),
    ("speed of reading, GB/s", "read_gb_per_s", 2, 1),
    ("were in memory, %", "hit_rate", 1, 0.01),
    ("first token after, s", "first_token_s", 2, 1),
    ("loading, s", "load_s", 1, 1),
    ("memory at most, MB", "peak_anonymous_bytes", 0, 1e6),
)
_ON_A_DEVICE: Final[Columns] = (
    ("over the bus, MB", "bus_bytes", 2, 1e6),
    ("the bus takes, ms", "bus_ms", 2, 1),
    ("device memory at most, MB", "device_peak_bytes", 0, 1e6),
)
_SAYS_SPEED: Final = (
    "All times are of one {one}. Tokens a second and the parts are means (the parts add up to the mean); the median {one} is "
    "the one in the middle. I/O: waiting for the disk. Window management: deciding what stays in memory. FFN products: "
    "multiplying the feed-forward weights. The rest: attention, the output matrix, Python."
)
_SAYS_READS: Final = (
    "Read: bytes from disk for one {one}, as hf_flash asked for them, or else as the disk delivered them. Were in memory: of "
    "the units that a {one} used, those that were not read for it. Memory at most: anonymous memory, which the kernel cannot "
    "take back."
)
_SAYS_CALLS: Final = (
    "Milliseconds of one call of the model with rows x tokens: 8x1 is a batch of eight sequences, 1x8 a draft of eight tokens, "
    "1x256 a prompt."
)
_SAYS_CHECKS: Final = (
    "How much hf_flash reads beside what the paper's window would have read, how fast beside the disk's own rate for reads of "
    "this size, and a floor for the time: what memory and disk take if nothing else does, one after the other or overlapped."
)


def page(report: dict[str, Any]) -> str:
    """The whole page.

    Args:
        report: from `hf_flash.bench.run.bench`.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    title = f"Decode speed of {escape(str(report['model']['source']))}"
    one = step_name(report["settings"])
    parts = [
        "<!doctype html>", '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{STYLE}</style></head><body>",
        f'<h1>{title}</h1><p class="setting">{escape(setting(report))}</p>', *_about(report), *_cards(report), *_rows(report),
        *(
            f'<h2>{drawing.title}</h2><p>{escape(drawing.says)}</p><figure>{drawing.svg}</figure>'
            for drawing in bench_drawings(report)
        ),
        *_figures(report, "Speed", _SAYS_SPEED.format(one=one), _SPEED),
        *_figures(report, "Reads, loading and memory", _SAYS_READS.format(one=one),
                  (*_READS, *(_ON_A_DEVICE if "device" in report["machine"] else ()))),
        *_calls(report), *_checks(report), *_disk(report["disk"]),
        f"<p>hf_flash {__version__}. Every system ran in a process of its own, in turn, from a cold page cache, greedy.</p>",
        "</body></html>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _about(report: dict[str, Any]) -> Iterator[str]:
    """What the figures depend on."""
    host, model = report["machine"], report["model"]
    yield (
        "<p>How fast a language model writes when its weights do not all fit into memory. hf_flash keeps feed-forward weights "
        "on disk and reads those that a token needs. Other rows are what it is compared with; each says which cap on memory it "
        "ran under.</p>"
    )
    yield (
        f"<p>The model: {format_bytes(model['dense_bytes'])} in {model['dtype']}, {model['layers']} layers, d_model "
        f"{model['d_model']}, d_ff {model['d_ff']}. "
    )
    versions = ", ".join(f"{name} {number}" for name, number in host["versions"].items())
    yield (
        f"The machine: {escape(host['cpu'])}, {host['cores']} cores, {host['torch_threads']} torch threads, "
        f"DRAM {host['dram_gb_per_s']:.1f} GB/s; {escape(host['disk'])}; {escape(host['kernel'])}; {versions}; "
        f"{host['date']}.</p>"
    )
    yield from (f"<p>{escape(note)}</p>" for note in report["notes"])
    if report.get("same_tokens") is not None:
        yield f"<p>Same tokens as without a cap: {'yes' if report['same_tokens'] else '<b>NO</b>'}</p>"


def _cards(report: dict[str, Any]) -> Iterator[str]:
    """The figures that most people want, of the row "flash" or else the first of hf_flash."""
    done = {row["system"]: (row, name) for row, name in _named(report) if "failed" not in row}
    ours, name = done.get("flash") or next((found for found in done.values() if found[0]["kind"] == "flash"), (None, ""))
    if ours is None:
        return
    figures = [(f"{ours['tokens_per_s']:.3g}", f"tokens a second: {name}")]
    for other in ("stock-ram", "stock-cap", "accelerate"):
        if other in done:
            row, words = done[other]
            figures.append((f"{ours['tokens_per_s'] / row['tokens_per_s']:.2g}x", f"as fast as {words}"))
    if ours["memory_bytes"]:
        figures.append((f"{ours['memory_bytes'] / report['model']['dense_bytes']:.0%}", "of the weights fit into memory"))
    read, one = f"{ours['read_bytes'] / 1e6:.3g} MB", step_name(report["settings"])
    figures.append((read, f"read for a {one}; {ours['hit_rate']:.0%} of what it used was in memory"))
    yield '<div class="cards">'
    yield from (f'<div class="card"><b>{number}</b><span>{escape(words)}</span></div>' for number, words in figures)
    yield "</div>"


def _rows(report: dict[str, Any]) -> Iterator[str]:
    """What the rows are, in words."""
    yield "<h2>What is compared</h2><dl>"
    for row, name in _named(report):
        if row["sweep"]:
            says = "hf_flash with this much memory for weights, and a cap that follows it"
        else:
            says = ROWS[row["system"]][1] if row["system"] in ROWS else "hf_flash with arguments of its own"
        yield f"<dt>{escape(name)}</dt><dd>{escape('; '.join([says, *_conditions(row)]))}</dd>"
    yield "</dl>"


def _conditions(row: dict[str, Any]) -> Iterator[str]:
    """With what a row ran."""
    found = row.get("stats", {})
    if "predictor" in found:
        yield f"predictor: {found['predictor']}"
    if "experts" in found:
        yield f"room for {found['capacity']} of {found['experts']} experts of a layer"
    yield "no cap" if row["cap_bytes"] is None else f"cap: {format_bytes(row['cap_bytes'])} by {row['cap']}"


def _named(report: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows, and what they are called."""
    return zip(report["rows"], row_names(report), strict=True)


# --- tables --------------------------------------------------------------------------------------------------------------


def _figures(report: dict[str, Any], title: str, says: str, columns: Columns) -> Iterator[str]:
    """A table with a line for every row of the report."""
    lines = []
    for row, name in _named(report):
        if "failed" in row:
            reason = textwrap.shorten(row["failed"], 400) if columns is _SPEED else "see above"
            lines.append((row["system"], name, [f"failed: {reason}"]))
            continue
        lines.append((row["system"], name, cells(row, columns)))
    yield from _table(title, says, f"a {step_name(report['settings'])}", [heading for heading, *_ in columns], lines)


def _calls(report: dict[str, Any]) -> Iterator[str]:
    """Calls of several tokens."""
    if names := call_names(report["settings"]):
        lines = [
            (row["system"], name, [f"{row['calls_ms'][call]:.1f}" for call in names])
            for row, name in _named(report)
            if "calls_ms" in row
        ]
        yield from _table("Calls of several tokens", _SAYS_CALLS, "a call, ms", names, lines)


def _checks(report: dict[str, Any]) -> Iterator[str]:
    """What the rows of hf_flash are held against (bench/checks.py)."""
    headings = ["read, MB", "the window law, MB", "read of it, %", "of the disk's rate, %", "floor: memory, ms",
                "floor: disk, ms", "overlapped, ms", "in turn, ms", "measured mean, ms"]  # fmt: skip
    lines = []
    for row, name in _named(report):
        if "floor_ms" in row:
            floor = [row["floor_ms"][part] for part in ("dram", "disk", "overlapped", "in_turn")]
            found = [number(row["read_bytes"], 2, 1e6), number(row["expected_bytes"], 2, 1e6),
                     number(row["expected_ratio"], 0, 0.01), number(row["disk_rate_share"], 0, 0.01)]  # fmt: skip
            lines.append((row["system"], name, [*found, *(f"{ms:.1f}" for ms in [*floor, row["mean_ms"]])]))
    if lines:
        one = f"a {step_name(report['settings'])}"
        yield from _table("What hf_flash is held against", _SAYS_CHECKS, one, headings, lines)


def _disk(points: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The curve: GB/s by size of a read and reads at a time."""
    sizes, rows = random_curve(points, 3)
    lines = [("", name, found) for name, *found in rows]
    in_turn = [
        f"{point['gb_per_s']:.3f} GB/s in turn, in reads of {format_bytes(point['size'])}"
        for point in points
        if point["pattern"] == "sequential"
    ]
    how = "past the page cache" if points[0]["direct"] else "through the page cache: there is no direct I/O here"
    says = f"GB/s of random reads of these sizes, {how}. " + "; ".join(in_turn)
    yield from _table("The disk's curve", says, "GB/s", [format_bytes(size) for size in sizes], lines)


def _table(
    title: str, says: str, first: str, headings: Sequence[str], lines: Sequence[tuple[str, str, Sequence[str]]]
) -> Iterator[str]:
    """A table in a box that scrolls.

    Args:
        first: the heading of the first column.
        lines: the short name of a row or `""`, what it is called, and its cells; a single one goes over all columns.
    """
    yield f'<h2>{title}</h2><p>{escape(says)}</p><div class="table"><table><tr><th>{first}</th>'
    yield "".join(f"<th>{escape(heading)}</th>" for heading in headings) + "</tr>"
    for short, name, row in lines:
        ours = ' class="ours"' if short == "flash" else ""
        known = f"<small>{escape(short)}</small>" if short not in ("", name) else ""
        if len(row) < len(headings):
            found = f'<td class="failed" colspan="{len(headings)}">{escape(row[0])}</td>'
        else:
            found = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        yield f"<tr{ours}><td>{escape(name)}{known}</td>{found}</tr>"
    yield "</table></div>"
