"""The examination of `hf-flash doctor`: is this machine fit for hf_flash, and what would make it fitter? It takes seconds.

Every finding has a verdict. *good*: nothing to do. *could be better*: it works, but you can gain speed or memory. *problem*: it
keeps hf_flash from working here. Where a system does not give an answer, the finding is left out; nothing is guessed.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from packaging.requirements import Requirement
from rich.console import Group
from rich.table import Table
from rich.text import Text

from hf_flash._version import __version__
from hf_flash.base.folders import scratch_file
from hf_flash.base.sizes import format_bytes
from hf_flash.base.tables import Paragraph, section
from hf_flash.bench.device import about_device
from hf_flash.bench.report import device_line, disk_figures
from hf_flash.budget.expert_plan import ExpertPlan
from hf_flash.budget.plan import ceiling_bytes
from hf_flash.compute import library as native
from hf_flash.compute.dram_speed import dram_gb_per_s
from hf_flash.config import FlashOffloadConfig
from hf_flash.errors import ConfigError, HfFlashError
from hf_flash.machine.about import cpu_name, mount_of, usable_cores
from hf_flash.machine.disk import DiskPoint, disk_curve, rate_at
from hf_flash.machine.free_memory import available_memory
from hf_flash.packing.flash_cache import cache_folder
from hf_flash.planning import planner
from hf_flash.planning.sentences import counted
from hf_flash.store.checkpoint import Checkpoint
from hf_flash.store.layout import FlashStore

GOOD, FAIR, BAD = "good", "could be better", "problem"
_COLOURS: Final = {GOOD: "green", FAIR: "yellow", BAD: "bold red"}

_LEAST_FILE: Final = 4 << 20  # to measure a disk with
_SCRATCH_BYTES: Final = 64 << 20
_TOKEN_BYTES: Final = 62_000_000  # what OPT-6.7B reads for a token at half of its memory (paper: 0.7 % of the FFN)
_FAST: Final = 0.3  # GB/s of 16 KiB at random: these are then read in 0.2 s
_SLOW_BUS: Final = 5.0  # GB/s to a GPU: PCIe 3 on 8 lanes has 7
_NETWORK: Final = ("nfs", "cifs", "smb", "fuse", "9p", "ceph", "afs", "virtiofs")


@dataclass(frozen=True)
class Finding:
    """What was looked at, the verdict, and what was found; `advice` where the verdict is not good."""

    name: str
    verdict: str
    found: str
    advice: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """All findings, and the curve of the disk if it could be measured."""

    place: str  # the folder whose disk was measured
    findings: tuple[Finding, ...]
    disk: tuple[DiskPoint, ...]

    @property
    def works(self) -> bool:
        """Whether nothing keeps hf_flash from working."""
        return all(finding.verdict != BAD for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"place": self.place, "works": self.works, "findings": [asdict(finding) for finding in self.findings],
                "disk": [asdict(point) | {"gb_per_s": point.gb_per_s} for point in self.disk]}  # fmt: skip

    def describe(self) -> Group:
        """What people read, to be printed by rich: the verdict first, then every finding."""
        count = {verdict: sum(finding.verdict == verdict for finding in self.findings) for verdict in _COLOURS}
        verdict = "hf_flash works here" if self.works else f"hf_flash does not work here: {counted(count[BAD], 'problem')}"
        better = f"; {count[FAIR]} of {len(self.findings)} findings could be better" if count[FAIR] else ""
        grid = Table.grid(padding=(0, 2))
        for _ in range(3):
            grid.add_column()
        for finding in self.findings:
            found = Text(finding.found)
            if finding.advice:
                found.append(f"\n{finding.advice}", style="italic")
            grid.add_row(Text(finding.verdict, style=_COLOURS[finding.verdict]), Text(finding.name), found)
        curve = [vars(point) | {"gb_per_s": point.gb_per_s} for point in self.disk]
        disk = [section("The disk, in GB/s", disk_figures(curve))] if curve else []
        return Group(Paragraph(f"{verdict}{better}.", "bold"), Text(), grid, *disk)


def diagnose(folder: str | os.PathLike[str] | None = None, *, disk_seconds: float = 0.1) -> Diagnosis:
    """Look at everything that hf_flash depends on.

    Args:
        folder: a model, repacked or plain, or any folder whose disk to measure. Default: the flash cache.
        disk_seconds: for each point of the disk's curve.

    Raises:
        ConfigError: there is no such folder.
    """
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError("not a folder", where="doctor", got=str(folder))
    wanted = Path(folder) if folder is not None else cache_folder(None)
    place = next(part for part in [wanted, *wanted.absolute().parents] if part.is_dir())
    points, disk = _disk(place, disk_seconds)
    findings = [_versions(), _compiled(), _threads(), _dram(), _memory(), *_huge_pages(), *_gpu(), *disk, _ring()]
    if folder is None:
        findings.append(_cache(wanted, place))
    elif (place / "config.json").exists():
        findings += _model(place)
    return Diagnosis(str(place), tuple(findings), points)


# --- the program and the processor -------------------------------------------------------------------------------------


def _versions() -> Finding:
    """Compare what is installed with what hf_flash requires."""
    found = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    found = f"hf_flash {__version__}, Python {platform.python_version()}, {found}; {platform.system()} {platform.release()}"
    try:
        asked = [Requirement(line) for line in metadata.requires("hf-flash") or ()]
    except metadata.PackageNotFoundError:  # runs from a folder
        asked = []
    wrong = [str(one) for one in asked if (not one.marker or one.marker.evaluate({"extra": ""})) and not _is_installed(one)]
    if wrong:
        return Finding("versions", BAD, found, "pip install -U " + " ".join(f'"{one}"' for one in wrong))
    if not sys.platform.startswith("linux"):
        return Finding("versions", FAIR, found, "on Linux it reads faster: direct I/O, io_uring")
    return Finding("versions", GOOD, found)


def _is_installed(wanted: Requirement) -> bool:
    try:
        return wanted.specifier.contains(metadata.version(wanted.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def _compiled() -> Finding:
    try:
        native.load()
    except (OSError, AttributeError) as error:
        advice = "torch computes instead, slower: install hf_flash where there is a C compiler, on x86-64 Linux with AVX2"
        return Finding("compiled part", FAIR, f"none: {error}", advice)
    return Finding("compiled part", GOOD, "there, and fits this processor")


def _threads() -> Finding:
    """Compare the threads of torch with the cores that this process may use."""
    threads, cores = torch.get_num_threads(), usable_cores()
    real = min(cores, psutil.cpu_count(logical=False) or cores)
    found = f"{threads} of torch, {cores} cores to use ({cpu_name()})"
    if threads > cores:
        return Finding("threads", FAIR, found, f"more threads than cores wait for one another: set OMP_NUM_THREADS={cores}")
    if 2 * threads < real:
        return Finding("threads", FAIR, found, f"large models use more: unset OMP_NUM_THREADS, or set it to {real}")
    return Finding("threads", GOOD, found + ("; one is free for reading ahead" if cores > threads else ""))


def _dram() -> Finding:
    speed = dram_gb_per_s(128 << 20, 3)
    found = f"{speed:.1f} GB/s with these threads"
    if speed < 5:
        return Finding("DRAM", FAIR, found, "slow: is something else running, or are there too few threads?")
    return Finding("DRAM", GOOD, found)


# --- memory ------------------------------------------------------------------------------------------------------------


def _memory() -> Finding:
    whole, free = psutil.virtual_memory(), available_memory()
    found = f"{format_bytes(free)} to use of {format_bytes(whole.total)}"
    found += ", by a limit of this process's cgroup" if free < whole.available else ""
    if free < 1 << 30:
        return Finding("memory", FAIR, found, "little even for small models: end other programs, or raise the limit")
    return Finding("memory", GOOD, found)


def _huge_pages(path: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> Iterator[Finding]:
    try:
        state = path.read_text()
    except OSError:  # another system, or a kernel without
        return
    chosen = state.partition("[")[2].partition("]")[0]
    if chosen == "never":
        yield Finding("huge pages", FAIR, chosen, f"rows are read a quarter faster with them: echo madvise > {path}, as root")
    else:
        yield Finding("huge pages", GOOD, chosen)


def _gpu() -> Iterator[Finding]:
    """What an accelerator is, and how fast bytes get there; nothing where torch has none."""
    if not torch.accelerator.is_available():
        return
    name = f"{torch.accelerator.current_accelerator()}:{torch.accelerator.current_device_index()}"
    try:
        device = about_device(name)
    except RuntimeError as error:  # of whatever driver
        yield Finding("GPU", FAIR, f"{name} does not answer", " ".join(str(error).split())[:200])
        return
    found, advice = device_line(device), None
    if not device["pinned"]:
        advice = "memory for copies is not pinned, so that they wait for one another: is `ulimit -l` low?"
    elif device["to_gb_per_s"] < _SLOW_BUS:
        advice = "slow: does the card have all its lanes? A layer's missing experts pass here for every token"
    yield Finding("GPU", FAIR if advice else GOOD, found, advice)


# --- disk --------------------------------------------------------------------------------------------------------------


def _disk(place: Path, seconds: float) -> tuple[tuple[DiskPoint, ...], list[Finding]]:
    """The curve, and the findings about the disk and how it can be read."""
    mount = mount_of(place)
    where = f"{place} ({mount.device}, {mount.fstype})" if mount else str(place)
    try:
        with _readable(place) as path:
            points = tuple(disk_curve(path, max_seconds=seconds, max_bytes=_SCRATCH_BYTES))
    except HfFlashError as error:
        return (), [Finding("disk", BAD, where, " ".join(str(error).split()))]
    return points, [_speed(points, where, mount.fstype if mount else ""), _direct(points)]


@contextmanager
def _readable(place: Path) -> Iterator[Path]:
    """Model files to measure with, or a scratch file if there are none."""
    try:
        sizes = [path.stat().st_size for path in place.glob("*.safetensors")]
    except OSError:
        sizes = []
    if max(sizes, default=0) >= _LEAST_FILE:
        yield place
        return
    noise = (os.urandom(1 << 20) for _ in range(_SCRATCH_BYTES >> 20))
    with scratch_file(place, "doctor", _SCRATCH_BYTES, noise) as path:
        yield path


def _speed(points: tuple[DiskPoint, ...], where: str, kind: str) -> Finding:
    speed = rate_at(points, 16 << 10, 32)
    longest = max(point.gb_per_s for point in points if point.pattern == "sequential")
    found = f"{where}: {speed:.2f} GB/s in random reads of 16 KiB, {longest:.2f} in long ones"
    if kind in ("tmpfs", "ramfs"):
        return Finding("disk", FAIR, found, "it lies in memory: reading from it saves none")
    if kind.startswith(_NETWORK):
        return Finding("disk", FAIR, found, "put models on a local SSD")
    if speed < _FAST:
        token = f"{_TOKEN_BYTES / 1e9 / speed:.1f} s"
        return Finding("disk", FAIR, found, f"at half of its memory, OPT-6.7B reads {token} for a token: use a faster SSD")
    return Finding("disk", GOOD, found)


def _direct(points: tuple[DiskPoint, ...]) -> Finding:
    if points[0].direct:
        return Finding("direct I/O", GOOD, "past the page cache")
    advice = "reads go through the page cache and take memory from it: choose another file system, such as ext4 or xfs"
    return Finding(
        "direct I/O", FAIR, "refused on this file system" if hasattr(os, "O_DIRECT") else "not on this system", advice
    )


def _ring() -> Finding:
    error = native.try_ring()
    if error:
        advice = "threads read instead: containers must allow io_uring_setup and io_uring_enter, kernels be 5.9 or newer"
        return Finding("io_uring", FAIR, f"none: {os.strerror(error)}", advice)
    return Finding("io_uring", GOOD, "there")


# --- cache and model ---------------------------------------------------------------------------------------------------


def _cache(cache: Path, place: Path) -> Finding:
    """Whether plain checkpoints can be repacked."""
    room = shutil.disk_usage(place).free
    found = f"{cache}, {format_bytes(room)} free on its disk"
    if not os.access(place, os.W_OK | os.X_OK):
        return Finding("flash cache", BAD, found, "plain checkpoints cannot be repacked: name a folder in HF_FLASH_CACHE")
    if room < 10 << 30:
        return Finding("flash cache", FAIR, found, "little room: a model of 7B parameters takes 9 GB there")
    return Finding("flash cache", GOOD, found)


def _model(folder: Path) -> Iterator[Finding]:
    """Whether the model in a folder can run in the memory that is free."""
    try:
        needed = planner.needs(folder)
        store = FlashStore.open_folder(folder) if any(folder.glob("flash-layer-*.safetensors")) else None
        if store is None:
            Checkpoint.open_folder(folder)  # its files are there, and begin as they should
    except HfFlashError as error:
        yield Finding("model", BAD, "cannot be loaded", " ".join(str(error).split()))
        return
    if isinstance(needed, ExpertPlan):
        kind, units, most = "a mixture of experts, read as it is", "experts", max(needed.experts)
    else:
        kind = "a plain checkpoint: repacked into the flash cache when it is loaded" if store is None else "repacked"
        units, most = "neurons", needed.d_ff
    yield Finding("model", GOOD, f"{needed.layers} layers of {most} {units}, {format_bytes(needed.dense_bytes)}; {kind}")
    budget, least = ceiling_bytes(None), format_bytes(needed.minimum_bytes)
    if budget < needed.minimum_bytes:
        yield Finding(
            "its memory", BAD, f"{least} at least, {format_bytes(budget)} to use", "end other programs, or raise the limit"
        )
        return
    given = replace(needed, budget_bytes=budget)
    found = f"{least} at least; {format_bytes(budget)} hold {given.capacity} of {most} {units} a layer"
    yield Finding("its memory", FAIR if (short := given.shortage(FlashOffloadConfig().window)) else GOOD, found, short)
