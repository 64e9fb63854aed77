"""What `hf-flash bench` reports: the machine that the figures depend on, and the tables."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from rich.console import Group, RenderableType

from hf_flash.base.sizes import format_bytes
from hf_flash.base.tables import Figures, Paragraph, facts, items, section
from hf_flash.bench.device import about_device
from hf_flash.bench.names import row_names, setting
from hf_flash.compute.dram_speed import dram_gb_per_s
from hf_flash.machine.about import cpu_name, mount_of


def machine(folder: Path, device: str | None = None) -> dict[str, Any]:
    """What the figures depend on."""
    disk = mount_of(folder)
    found = {
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=True),
        "torch_threads": torch.get_num_threads(),
        "dram_bytes": psutil.virtual_memory().total,
        "dram_gb_per_s": dram_gb_per_s(),
        "disk": f"{disk.device}, {disk.fstype}" if disk else "unknown",
        "kernel": f"{platform.system()} {platform.release()}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "accelerate", "safetensors")},
    }
    return found if device is None else found | {"device": about_device(device)}


def describe(report: dict[str, Any]) -> Group:
    """A report as tables, to be printed by rich."""
    host, model = report["machine"], report["model"]
    named = [(f"{name} ({row['system']})", row) for name, row in zip(row_names(report), report["rows"], strict=True)]
    done = [(name, row) for name, row in named if "failed" not in row]
    failed = [(name, row["failed"]) for name, row in named if "failed" in row]
    return Group(
        Paragraph(f"{model['source']}: {format_bytes(model['dense_bytes'])} in {model['dtype']}; {setting(report)}", "bold"),
        Paragraph(
            f"{host['cpu']}, {host['cores']} cores, {host['torch_threads']} torch threads, DRAM {host['dram_gb_per_s']:.1f} "
            f"GB/s; {host['disk']}; {host['kernel']}; {host['date']}"
        ),
        *([Paragraph(device_line(host["device"]))] if "device" in host else []),
        *map(Paragraph, report["notes"]),
        *(section(title, _figures(done, columns)) for title, columns in _tables(report) if done),
        *([section("Calls of several tokens, rows x tokens: ms", _calls(done, names_of_calls))]
          if (names_of_calls := call_names(report["settings"])) else []),
        *([section("What failed", facts(failed))] if failed else []),
        *([section("What hf_flash is held against", items(held))] if (held := list(check_lines(report["rows"]))) else []),
        section("The disk, in GB/s", disk_figures(report["disk"])),
        *_same_tokens(report),
    )  # fmt: skip


def _same_tokens(report: dict[str, Any]) -> Iterator[RenderableType]:
    if "same_tokens" in report:
        answer = {True: "yes", False: "NO", None: "not known, a row failed"}[report["same_tokens"]]
        yield ""
        yield Paragraph(f"hf_flash generates the same tokens without a cap: {answer}", "bold")


Columns = tuple[tuple[str, str, int, float], ...]  # heading, field, digits, unit

_SPEED: Final[Columns] = (
    ("tokens/s", "tokens_per_s", 2, 1),
    ("median ms", "median_ms", 1, 1),
    ("p95 ms", "p95_ms", 1, 1),
    ("read MB", "bytes", 2, 1e6),
    ("hits %", "hit_rate", 1, 0.01),
)
_TIMES: Final[Columns] = (
    ("read", "io", 2, 1),
    ("manage", "manage", 2, 1),
    ("predict", "predict", 2, 1),
    ("FFN", "compute", 2, 1),
    ("rest", "rest", 2, 1),
)
_READING: Final[Columns] = (
    ("reads", "reads", 0, 1),
    ("KiB a read", "run_bytes", 1, 1024),
    ("GB/s", "read_gb_per_s", 2, 1),
)
_BEFORE: Final[Columns] = (
    ("load s", "load_s", 1, 1),
    ("first s", "first_token_s", 2, 1),
    ("anon MB", "peak_anonymous_bytes", 0, 1e6),
)
_DEVICE: Final[Columns] = (  # of rows that compute on a device
    ("bus MB", "bus_bytes", 2, 1e6),
    ("bus ms", "bus_ms", 2, 1),
    ("peak MB", "device_peak_bytes", 0, 1e6),
)


def _tables(report: dict[str, Any]) -> Iterator[tuple[str, Columns]]:
    one = step_name(report["settings"])
    yield f"Speed, for a {one}", _SPEED
    yield f"Where the time of a {one} goes, in ms (mean)", _TIMES
    yield f"Reading, for a {one}", _READING
    yield "Loading, the first token, and memory of the process at its most", _BEFORE
    if "device" in report["machine"]:
        yield f"The device, for a {one}", _DEVICE


def cells(row: dict[str, Any], columns: Columns) -> list[str]:
    """A row's figures, those of its parts too. Bytes are what hf_flash asked for, or else what the disk delivered."""
    values = row | row.get("parts_ms", {}) | {"bytes": row.get("read_bytes", row["disk_bytes"])}
    return [number(values.get(key), digits, unit) for _, key, digits, unit in columns]


def _figures(done: list[tuple[str, dict[str, Any]]], columns: Columns) -> Figures:
    """Rows that have any of the figures; those of speed say what they ran with, too."""
    with_conditions = columns is _SPEED
    rows = []
    for name, row in done:
        found = cells(row, columns)
        if set(found) != {"-"}:
            rows.append((name, *found, *([f"{conditions(row)}{_spread(row)}"] if with_conditions else [])))
    headings = [heading for heading, *_ in columns]
    if with_conditions:
        return Figures(["system", *headings, "with"], rows, notes=frozenset((len(headings) + 1,)))
    return Figures(["system", *headings], rows)


def _calls(done: list[tuple[str, dict[str, Any]]], names: list[str]) -> Figures:
    rows = [(name, *(number(row["calls_ms"].get(call), 1) for call in names)) for name, row in done if "calls_ms" in row]
    return Figures(["system", *names], rows)


def device_line(device: dict[str, Any]) -> str:
    """A device, for people."""
    pinned = "pinned" if device["pinned"] else "plain"
    return (
        f"{device['name']}, {format_bytes(device['memory_bytes'])} at {device['memory_gb_per_s']:.0f} GB/s; copies between it "
        f"and {pinned} memory: {device['to_gb_per_s']:.1f} GB/s there, {device['from_gb_per_s']:.1f} back"
    )


def step_name(settings: dict[str, Any]) -> str:
    """What figures are per: a token, or a step that makes one of every sequence. Old reports say nothing of batches."""
    return "step" if settings.get("batch_size", 1) > 1 else "token"


def conditions(row: dict[str, Any]) -> str:
    """The predictor of a row of hf_flash, or its slots for experts; and the cap."""
    found = row.get("stats", {})
    slots = f"{found['capacity']} of {found['experts']} experts" if "experts" in found else ""
    return ", ".join(filter(None, [found.get("predictor", ""), slots, str(row["cap"])]))


def call_names(settings: dict[str, Any]) -> list[str]:
    """The calls that were timed, rows x tokens, in their order."""
    return [f"{rows}x{tokens}" for rows, tokens in settings.get("calls", ())]


def check_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What the rows of hf_flash are held against (bench/checks.py): a window as in the paper, and a floor of the time."""
    for row in (row for row in rows if "floor_ms" in row):
        floor, window, rate = row["floor_ms"], row["window_tokens"], row["disk_rate_share"]
        read = f"read {row['read_bytes'] / 1e6:.2f} MB"
        if row["expected_bytes"] is not None:
            kept = "" if window is None else f" that keeps {window:.1f} tokens"
            read += f"; a window{kept} would read {row['expected_bytes'] / 1e6:.2f} MB, {number(row['expected_ratio'], 2)} to 1"
        at = "" if rate is None else f", at {rate:.0%} of the disk's rate"
        yield (
            f"{row['system']}: {read}{at}. DRAM alone would take {floor['dram']:.1f} ms, the disk alone {floor['disk']:.1f}: "
            f"{floor['overlapped']:.1f} at once, {floor['in_turn']:.1f} in turn; measured: {row['mean_ms']:.1f} (mean)"
        )


def number(value: float | None, digits: int, unit: float = 1) -> str:
    """A figure with so many digits, in a unit; `-` where there is none."""
    return "-" if value is None else f"{value / unit:.{digits}f}"


def _spread(row: dict[str, Any]) -> str:
    speeds = [speed for speed in row["runs_tokens_per_s"] if speed is not None]
    return f", {min(speeds):.2f}-{max(speeds):.2f} tok/s in {len(speeds)} runs" if len(row["runs_tokens_per_s"]) > 1 else ""


def random_curve(points: Sequence[dict[str, Any]], digits: int) -> tuple[list[int], list[list[str]]]:
    """The sizes of random reads, and a row for every number of reads at a time: its name, and GB/s by size."""
    at = {(point["depth"], point["size"]): point["gb_per_s"] for point in points if point["pattern"] == "random"}
    sizes, depths = sorted({size for _, size in at}), sorted({depth for depth, _ in at})
    return sizes, [
        [f"random, {depth} at a time", *(number(at.get((depth, size)), digits) for size in sizes)] for depth in depths
    ]


def disk_figures(points: list[dict[str, Any]]) -> RenderableType:
    """A curve as a table: GB/s by size of a read and reads at a time, and in sequence."""
    sizes, rows = random_curve(points, 2)
    long = {point["size"]: point["gb_per_s"] for point in points if point["pattern"] == "sequential"}
    in_sequence = ["sequential", *(f"{long[size]:.2f}" if size in long else "" for size in sizes)]
    notes = [] if points[0]["direct"] else [Paragraph("Through the page cache: this file system has no direct I/O.")]
    return Group(Figures(["reads of", *map(format_bytes, sizes)], [*rows, in_sequence]), *notes)
