"""What `hf-flash bench` reports: the machine that the figures depend on, and the tables."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import psutil
import torch

from hf_flash.base.sizes import format_bytes
from hf_flash.bench.device import about_device
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


def describe(report: dict[str, Any]) -> str:
    """A report as tables."""
    host, model, settings = report["machine"], report["model"], report["settings"]
    memory = f"weights {format_bytes(settings['memory_bytes'])}, cap {format_bytes(settings['cap_bytes'])}"
    if all(row["sweep"] for row in report["rows"]):
        memory = "weights and cap as each row says"
    lines = [
        f"{model['source']}: {format_bytes(model['dense_bytes'])}, {model['dtype']}; {generated(settings)}; {memory}",
        f"{host['cpu']}, {host['cores']} cores, {host['torch_threads']} torch threads, "
        f"DRAM {host['dram_gb_per_s']:.1f} GB/s; {host['disk']}; {host['kernel']}; {host['date']}",
        *([device_line(host["device"])] if "device" in host else []),
        *report["notes"],
        "",
        *_speed_table(report, step_name(settings)),
        *_calls_table(report["rows"], call_names(settings)),
        *check_lines(report["rows"]),
        "",
        *disk_table(report["disk"]),
    ]
    if "same_tokens" in report:
        answer = {True: "yes", False: "NO", None: "not known, a row failed"}[report["same_tokens"]]
        lines += ["", f"flash generates the same tokens without a cap: {answer}"]
    return "\n".join(lines)


COLUMNS: Final = (  # heading, width, field, digits, unit
    ("tok/s", 8, "tokens_per_s", 2, 1),
    ("median", 9, "median_ms", 1, 1),
    ("p95 ms", 9, "p95_ms", 1, 1),
    ("I/O ms", 9, "io", 2, 1),
    ("manage", 8, "manage", 2, 1),
    ("predict", 8, "predict", 2, 1),
    ("compute", 9, "compute", 2, 1),
    ("rest", 9, "rest", 2, 1),
    ("MB", 9, "bytes", 2, 1e6),
    ("reads", 8, "reads", 0, 1),
    ("KiB/read", 9, "run_bytes", 1, 1024),
    ("GB/s", 6, "read_gb_per_s", 2, 1),
    ("hits %", 7, "hit_rate", 1, 0.01),
    ("first s", 9, "first_token_s", 2, 1),
    ("load s", 8, "load_s", 1, 1),
    ("anon MB", 9, "peak_anonymous_bytes", 0, 1e6),
)
_DEVICE_COLUMNS: Final = (  # of rows that compute on a device
    ("bus MB", 9, "bus_bytes", 2, 1e6),
    ("bus ms", 8, "bus_ms", 2, 1),
    ("peak MB", 9, "device_peak_bytes", 0, 1e6),
)


def columns(report: dict[str, Any]) -> tuple[tuple[str, int, str, int, float], ...]:
    """The columns of a report's table of rows."""
    return (*COLUMNS, *(_DEVICE_COLUMNS if "device" in report["machine"] else ()))


def device_line(device: dict[str, Any]) -> str:
    """A device, for people."""
    pinned = "pinned" if device["pinned"] else "plain"
    return (
        f"{device['name']}, {format_bytes(device['memory_bytes'])} at {device['memory_gb_per_s']:.0f} GB/s; copies between it "
        f"and {pinned} memory: {device['to_gb_per_s']:.1f} GB/s there, {device['from_gb_per_s']:.1f} back"
    )


def generated(settings: dict[str, Any]) -> str:
    """What was generated."""
    which = "given tokens" if settings.get("forced") else "tokens"
    found = f"{settings['tokens']} {which} after a prompt of {settings['prompt_tokens']}"
    return found + (f", {settings['batch_size']} sequences at once" if step_name(settings) == "step" else "")


def step_name(settings: dict[str, Any]) -> str:
    """What figures are per: a token, or a step that makes one of every sequence. Old reports say nothing of batches."""
    return "step" if settings.get("batch_size", 1) > 1 else "token"


def _speed_table(report: dict[str, Any], one: str) -> Iterator[str]:
    """One system a line; all but the last columns are per token or step. MB: asked of the reader, or else of the disk."""
    rows, shown = report["rows"], columns(report)
    wide = max(len(row["system"]) for row in rows) + 2
    yield f"{f'a {one}:':<{wide}}" + "".join(f"{heading:>{width}}" for heading, width, *_ in shown) + "  with"
    for row in rows:
        if "failed" in row:
            yield f"{row['system']:<{wide}}  failed ({conditions(row)}): {row['failed'][:200]}"
            continue
        found = "".join(f"{cell:>{width}}" for cell, (_, width, *_) in zip(cells(row, report), shown, strict=True))
        yield f"{row['system']:<{wide}}{found}  {conditions(row)}{_spread(row)}"


def conditions(row: dict[str, Any]) -> str:
    """The predictor of a row of hf_flash, or its slots for experts; and the cap."""
    found = row.get("stats", {})
    slots = f"{found['capacity']} of {found['experts']} experts" if "experts" in found else ""
    return ", ".join(filter(None, [found.get("predictor", ""), slots, str(row["cap"])]))


def call_names(settings: dict[str, Any]) -> list[str]:
    """The calls that were timed, rows x tokens, in their order."""
    return [f"{rows}x{tokens}" for rows, tokens in settings.get("calls", ())]


def _calls_table(rows: list[dict[str, Any]], names: list[str]) -> Iterator[str]:
    """What calls take in ms, one system a line."""
    if not names:
        return
    wide = max(len(row["system"]) for row in rows) + 2
    yield from ("", f"{'a call, ms:':<{wide}}" + "".join(f"{name:>9}" for name in names))
    for row in rows:
        if "calls_ms" in row:
            yield f"{row['system']:<{wide}}" + "".join(f"{_number(row['calls_ms'].get(name), 1):>9}" for name in names)


def cells(row: dict[str, Any], report: dict[str, Any]) -> Iterator[str]:
    """A row's figures, by the report's `columns`."""
    values = row | row.get("parts_ms", {}) | {"bytes": row.get("read_bytes", row["disk_bytes"])}
    return (_number(values.get(key), digits, unit) for _, _, key, digits, unit in columns(report))


def check_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What the rows of hf_flash are held against (bench/checks.py), two lines each."""
    held = [row for row in rows if "floor_ms" in row]
    yield from [""] if held else []
    for row in held:
        floor, window = row["floor_ms"], row["window_tokens"]
        law, read = "", f"read {row['read_bytes'] / 1e6:.2f} MB"
        if row["expected_bytes"] is not None:
            law = f"{row['expected_bytes'] / 1e6:.2f} MB a token by the window law"
            law += "; " if window is None else f", {window:.1f} tokens kept; "
            read = f"read {row['read_bytes'] / 1e6:.2f}: {_number(row['expected_ratio'], 2)} of it"
        rate = row["disk_rate_share"]
        yield f"{row['system']}: {law}{read}" + ("" if rate is None else f", at {rate:.0%} of the disk's rate")
        yield (
            f"  floor: DRAM {floor['dram']:.1f} ms, disk {floor['disk']:.1f}; {floor['overlapped']:.1f} overlapped, "
            f"{floor['in_turn']:.1f} in turn; measured {row['mean_ms']:.1f} (mean)"
        )


def _number(value: float | None, digits: int, unit: float = 1) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"


def _spread(row: dict[str, Any]) -> str:
    speeds = [speed for speed in row["runs_tokens_per_s"] if speed is not None]
    return f", {min(speeds):.2f}-{max(speeds):.2f} tok/s in {len(speeds)} runs" if len(row["runs_tokens_per_s"]) > 1 else ""


def disk_table(points: list[dict[str, Any]]) -> Iterator[str]:
    """A curve as a table: GB/s by size of a read and reads at a time."""
    random = [point for point in points if point["pattern"] == "random"]
    sizes, depths = (sorted({point[key] for point in random}) for key in ("size", "depth"))
    how = "" if points[0]["direct"] else " (through the page cache: no direct I/O here)"
    yield f"{f'disk, GB/s{how}':<22}" + "".join(f"{format_bytes(size):>11}" for size in sizes)
    for depth in depths:
        at = {point["size"]: point["gb_per_s"] for point in random if point["depth"] == depth}
        yield f"{f'random, {depth} at a time':<22}" + "".join(f"{_number(at.get(size), 3):>11}" for size in sizes)
    for point in points:
        if point["pattern"] == "sequential":
            yield f"{'sequential':<22}{_number(point['gb_per_s'], 3):>11} in reads of {format_bytes(point['size'])}"
