"""A bench report as one HTML file: figures, drawings and tables, light or dark as the reader's system is. It loads nothing."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from html import escape
from typing import Any

from hf_flash._version import __version__
from hf_flash.base.sizes import format_bytes
from hf_flash.bench.plots import bench_drawings
from hf_flash.bench.report import call_names, cells, check_lines, columns, conditions, disk_table, generated, step_name

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfd; --card: #fff; --text: #1c2130; --soft: #667085; --lines: #d9dde5;
        --accent: #d9730d; }
@media (prefers-color-scheme: dark) {
  :root { --page: #11141b; --card: #191d27; --text: #e4e8f1; --soft: #96a0b5; --lines: #353c4c; --accent: #ffa826; } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 64rem; background: var(--page); color: var(--text);
       font: 15px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { margin: 0; font-size: 1.7rem; letter-spacing: -.01em } h2 { margin: 2.6rem 0 .8rem; font-size: 1.1rem }
p { margin: .35rem 0; color: var(--soft) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .8rem; margin-top: 1.6rem }
.card, figure, .table { background: var(--card); border: 1px solid var(--lines); border-radius: .7rem }
.card { padding: .9rem 1.1rem } .card b { display: block; white-space: nowrap; font-size: 1.45rem; line-height: 1.25;
        color: var(--accent); font-variant-numeric: tabular-nums } .card span { color: var(--soft); font-size: .85rem }
figure { margin: 0; padding: 1rem } svg { display: block; width: 100%; height: auto }
.table { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .82rem;
         font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { padding: .5rem .7rem; text-align: right; border-bottom: 1px solid var(--lines) } tr:last-child td { border-bottom: 0 }
th { color: var(--soft); font-weight: 500 } th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
     background: var(--card) } td.failed { text-align: left; white-space: normal; color: var(--soft) }
tr.ours td:first-child { color: var(--accent); font-weight: 600 }
pre { margin: 0; padding: 1rem; font: .78rem/1.5 ui-monospace, "SF Mono", Consolas, monospace }
"""


def page(report: dict[str, Any]) -> str:
    """The whole page.

    Args:
        report: from `hf_flash.bench.run.bench`.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    model = report["model"]
    title = f"{escape(str(model['source']))}: decode speed"
    parts = [
        "<!doctype html>", '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{title}</h1>", *_about(report), *_cards(report),
        *(f"<h2>{title}</h2><figure>{drawing}</figure>" for title, drawing in bench_drawings(report)),
        "<h2>All figures</h2>", *_table(report, step_name(report["settings"])),
        *_calls(report["rows"], call_names(report["settings"])),
        *_lines("What hf_flash is held against", check_lines(report["rows"])),
        *_lines("The disk's curve", disk_table(report["disk"])),
        f"<p>hf_flash {__version__}. Every system ran in a process of its own, in turn, from a cold page cache, greedy.</p>",
        "</body></html>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _about(report: dict[str, Any]) -> Iterator[str]:
    """What the figures depend on."""
    host, model, settings = report["machine"], report["model"], report["settings"]
    yield (
        f"<p>{format_bytes(model['dense_bytes'])} in {model['dtype']}, {model['layers']} layers, d_model {model['d_model']}, "
        f"d_ff {model['d_ff']}; {generated(settings)}</p>"
    )
    versions = ", ".join(f"{name} {number}" for name, number in host["versions"].items())
    yield (
        f"<p>{escape(host['cpu'])}, {host['cores']} cores, {host['torch_threads']} torch threads, "
        f"DRAM {host['dram_gb_per_s']:.1f} GB/s; {escape(host['disk'])}; {escape(host['kernel'])}</p>"
    )
    yield f"<p>{versions}; {host['date']}</p>"
    yield from (f"<p>{escape(note)}</p>" for note in report["notes"])
    if report.get("same_tokens") is not None:
        yield f"<p>Same tokens as without a cap: {'yes' if report['same_tokens'] else '<b>NO</b>'}</p>"


def _cards(report: dict[str, Any]) -> Iterator[str]:
    """The figures that most people want, of the row "flash" or else the first of hf_flash."""
    done = {row["system"]: row for row in report["rows"] if "failed" not in row}
    ours = done.get("flash") or next((row for row in done.values() if row["kind"] == "flash"), None)
    if ours is None:
        return
    figures = [(f"{ours['tokens_per_s']:.3g}", f"tokens a second: {ours['system']}")]
    names = {"stock-ram": "stock, all in memory, no cap", "stock-cap": "stock under the same cap", "accelerate": "accelerate"}
    for name, words in names.items():
        if name in done:
            figures.append((f"{ours['tokens_per_s'] / done[name]['tokens_per_s']:.2g}x", f"as fast as {words}"))
    if ours["memory_bytes"]:
        figures.append((f"{ours['memory_bytes'] / report['model']['dense_bytes']:.0%}", "of the weights fit into DRAM"))
    read, one = f"{ours['read_bytes'] / 1e6:.3g} MB", step_name(report["settings"])
    figures.append((read, f"read for a {one}; {ours['hit_rate']:.0%} of its neurons were there"))
    yield '<div class="cards">'
    yield from (f'<div class="card"><b>{number}</b><span>{escape(words)}</span></div>' for number, words in figures)
    yield "</div>"


def _table(report: dict[str, Any], one: str) -> Iterator[str]:
    rows, shown = report["rows"], columns(report)
    yield f'<div class="table"><table><tr><th>a {one}</th>'
    yield "".join(f"<th>{heading}</th>" for heading, *_ in shown) + "<th>with</th></tr>"
    for row in rows:
        name, ours = escape(row["system"]), ' class="ours"' if row["system"] == "flash" else ""
        if "failed" in row:
            reason = f'<td class="failed" colspan="{len(shown)}">failed: {escape(textwrap.shorten(row["failed"], 400))}</td>'
            yield f"<tr><td>{name}</td>{reason}<td>{conditions(row)}</td></tr>"
            continue
        found = "".join(f"<td>{cell}</td>" for cell in cells(row, report))
        yield f"<tr{ours}><td>{name}</td>{found}<td>{conditions(row)}</td></tr>"
    yield "</table></div>"


def _calls(rows: list[dict[str, Any]], names: list[str]) -> Iterator[str]:
    """Calls of several tokens."""
    if not names:
        return
    yield '<h2>Calls of several tokens, rows x tokens: ms</h2><div class="table"><table><tr><th>a call</th>'
    yield "".join(f"<th>{name}</th>" for name in names) + "</tr>"
    for row in rows:
        if "calls_ms" in row:
            found = "".join(f"<td>{row['calls_ms'][name]:.1f}</td>" for name in names)
            yield f"<tr><td>{escape(row['system'])}</td>{found}</tr>"
    yield "</table></div>"


def _lines(title: str, lines: Iterator[str]) -> Iterator[str]:
    text = "\n".join(lines).strip("\n")
    if text:
        yield f'<h2>{title}</h2><div class="table"><pre>{escape(text)}</pre></div>'
