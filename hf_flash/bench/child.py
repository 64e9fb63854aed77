"""Running one system of a benchmark: a child process (bench/worker.py) under a cap of its own, from a cold page cache."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_flash.base.sizes import format_bytes, parse_share
from hf_flash.bench.systems import System
from hf_flash.machine.memory_cap import memory_cap


@dataclass(frozen=True)
class Job:
    """What all systems of a run have in common."""

    folder: Path
    plain: Path | None
    prompts: list[list[int]]  # of one length
    tokens: int
    dense: int  # bytes of the whole model
    memory: int | str  # budget for weights in DRAM, a size or a share of it
    headroom: int  # what the cap allows beyond it
    cap: bool
    timeout: float
    calls: Sequence[tuple[int, int]] = ()  # rows and tokens
    forced: Sequence[int] = ()  # token ids that follow the prompt; none: those that the model chooses
    device: str | None = None  # where all systems compute, if that is not this machine's processor

    def budget(self, system: System) -> int:
        """Bytes for weights in DRAM; the cap follows it."""
        return parse_share(system.memory or self.memory, self.dense)

    def spec(self, system: System) -> dict[str, Any]:
        """What the child is told."""
        return {
            "kind": system.kind, "folder": str(self.folder if system.kind == "flash" else self.plain), "prompts": self.prompts,
            "tokens": self.tokens, "calls": self.calls, "forced": self.forced,
            "device": self.device, "ffn_only": system.ffn_only,
            "in_memory": system.in_memory, "window_off": system.window_off, "torn": system.torn,
            "arguments": {"memory_budget": self.budget(system)} | system.arguments,
        }  # fmt: skip

    def run(self, system: System) -> dict[str, Any]:
        """One system in a fresh process: a row, with `failed` instead of figures if it did not get through."""
        spec, budget = self.spec(system), self.budget(system)
        _drop_from_page_cache(Path(spec["folder"]))
        with (
            tempfile.TemporaryDirectory(prefix="hf-flash-bench-") as place,
            memory_cap(budget + self.headroom if self.cap and system.capped else None) as cap,
        ):
            (Path(place) / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
            command = cap.command([sys.executable, "-m", "hf_flash.bench.worker", str(Path(place) / "spec.json")])
            code, out, err = _finish(command, Path(place), self.timeout)
        row = {"system": system.label, "kind": system.kind, "arguments": system.arguments, "sweep": system.memory,
               "memory_bytes": budget if system.capped else None, "cap": cap.label, "cap_bytes": cap.nbytes}  # fmt: skip
        if code == 0:
            found: dict[str, Any] = json.loads(out.splitlines()[-1])
            return row | found | ({} if cap.nbytes else {"cgroup_peak_bytes": None})  # not of a cgroup of its own
        return row | {"failed": _reason(code, err, cap.nbytes, self.timeout)}


def _finish(command: list[str], place: Path, timeout: float) -> tuple[int | None, str, str]:
    """Exit code (`None`: out of time) and output of a child that does not outlive us, come what may."""
    package = str(Path(__file__).resolve().parent.parent.parent)
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    with open(place / "out", "w+") as out, open(place / "err", "w+") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | {"PYTHONPATH": path})
        try:
            code: int | None = child.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            child.kill()
            child.wait()
        out.seek(0)
        err.seek(0)
        return code, out.read(), err.read()


def _reason(code: int | None, err: str, ceiling: int | None, timeout: float) -> str:
    """Why a child ended, in a line."""
    if code is None:
        return f"not done after {timeout:.0f} s"
    if code in (-9, 137):
        return f"out of memory under the cap of {format_bytes(ceiling)}" if ceiling else "killed: out of memory?"
    lines = [" ".join(line.split()) for line in err.splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt)\b", line)]
    found = "; ".join(lines[starts[-1] :] if starts else lines[-1:])
    return re.sub(r"^(\w+\.)+(?=\w+(Error|Exception)\b)", "", found) or f"exit code {code}"


def _drop_from_page_cache(folder: Path) -> None:
    """Make the next one start cold: what the kernel holds of these files goes, as far as nobody maps it."""
    for path in folder.iterdir() if hasattr(os, "posix_fadvise") else ():
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)  # pages not yet written cannot be dropped
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
