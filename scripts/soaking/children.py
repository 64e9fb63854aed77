"""What all parts share: a soak's settings, the figures of a part, and forked children with limits.

A child is forked from a process that has imported everything and computed with one thread, so that starting one takes
milliseconds. It has a limit on its memory, dies with its parent, says what it did over a pipe, and is killed when it is
silent for too long.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import select
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

MOST_SHOWN: Final = 20  # faults of a part
_MEMORY: Final = 2 << 30  # of a child, beyond what it has when it is forked
_DIE_WITH_PARENT: Final = 1  # PR_SET_PDEATHSIG
Say = Callable[[Any], None]


@dataclass(frozen=True)
class Soak:
    """One run: where it works, which share of the counts, the seed, how many processes at a time."""

    work: Path
    scale: float = 1.0
    seed: int = 0
    jobs: int = 1
    case: int | None = None  # of fuzz: this one alone

    def count(self, full: int, least: int = 1) -> int:
        return max(least, round(full * self.scale))

    def random(self, *names: object) -> random.Random:
        """Random numbers that depend on the seed and these names alone."""
        return random.Random(f"{self.seed} {names}")


@dataclass
class Figures:
    """What a part did: outcomes with their counts, faults with what reproduces them, and what was measured."""

    part: str
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    measured: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def fault(self, what: str) -> None:
        self.outcomes["wrong"] += 1
        self.faults.append(what)

    def line(self) -> str:
        return f"{self.part:<16}{self.counts()}; {self.seconds:.0f} s"

    def counts(self) -> str:
        done = [f"{count} {outcome}" for outcome, count in self.outcomes.most_common() if outcome != "wrong"]
        done += [f"{name} {value}" for name, value in self.measured.items()]
        return "; ".join([*done, f"{self.outcomes['wrong']} wrong"])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"outcomes": dict(self.outcomes)}


class Silent(Exception):
    """A child said nothing for too long, and was killed."""


class Child:
    """A forked process that runs `job(say)`; `say` sends a JSON value to the parent."""

    def __init__(self, job: Callable[[Say], None], memory: int = _MEMORY) -> None:
        self._out, inside = os.pipe()
        self._rest = b""
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._out)
            _live(job, inside, memory)
        os.close(inside)
        self._code: int | None = None

    def hear(self, limit_s: float) -> Iterator[Any]:
        """What the child says, until it ends.

        Raises:
            Silent: it has said nothing for `limit_s`.
        """
        while True:
            while b"\n" in self._rest:
                line, self._rest = self._rest.split(b"\n", 1)
                yield json.loads(line)
            if not select.select([self._out], [], [], limit_s)[0]:
                self.kill()
                raise Silent(f"silent for {limit_s:.0f} s")
            data = os.read(self._out, 1 << 16)
            if not data:
                return
            self._rest += data

    def kill(self) -> None:
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)

    def end(self) -> int:
        """Wait for its end; the exit code, or minus the signal."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._out)
        return self._code


def _live(job: Callable[[Say], None], pipe: int, memory: int) -> None:
    """The whole life of a child; does not return."""

    def say(message: Any) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(pipe, data) :]

    try:
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        limit, hard = 1024 * status("VmSize") + memory, resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        job(say)
        os._exit(0)
    except BaseException:  # noqa: BLE001  whatever it is, the parent reports it
        say({"error": traceback.format_exc()[-1500:]})
    finally:
        os._exit(1)


def ask(job: Callable[[Say], None], limit_s: float = 120) -> tuple[list[Any], str]:
    """Run a job in a child; what it said, and what was wrong with its end, "" if nothing."""
    child, said, wrong = Child(job), [], ""
    try:
        for message in child.hear(limit_s):
            if isinstance(message, dict) and "error" in message:
                wrong = message["error"]
            else:
                said.append(message)
    except Silent as error:
        wrong = str(error)
    code = child.end()
    return said, wrong or ("" if code == 0 else f"ended with {code}")


def status(name: str) -> int:
    """A number of /proc/self/status, sizes in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def timed(part: str, run: Callable[[Soak, Figures], None], soak: Soak) -> Figures:
    """Run a part; its figures."""
    figures, start = Figures(part), time.monotonic()
    run(soak, figures)
    figures.seconds = round(time.monotonic() - start, 1)
    return figures
