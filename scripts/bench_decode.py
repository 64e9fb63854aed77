#!/usr/bin/env python3
"""`hf-flash bench` on the shapes of real models whose weights need not be downloaded: synthetic ones, made in --workdir.

    scripts/bench_decode.py --preset 2.7b --workdir DIR [--dtype float16] [--predictor lowrank] [any option of hf-flash bench]
    scripts/bench_decode.py --preset 2.7b --workdir DIR/disk --standin DIR --class sata     as on a slower disk

The model is made once (scripts/make_synthetic_opt.py: random weights, sparsity and overlap of tokens as in the paper) and takes
twice its size on disk, plain and repacked: 11 GB for 2.7b, 27 GB for 6.7b. Without --preset it is `hf-flash bench`.

--class slows a stand-in disk down (scripts/standin_ssd) by a cgroup that this process enters, and with it every row and the
measurement of the disk: direct reads, page faults and readahead all count. Needs root, as the stand-in does. The kernel limits
the average over a tenth of a second: rows that read more than the class allows get what it allows, but short batches of reads
with something to compute in between pass at the stand-in's own speed. Their `disk_rate_share` is above 1 then; such a row is
faster than it would be on a disk that is slow for every read.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_flash.commands.main import main as hf_flash_main

NOTE = "disk slowed down to class {}: {}, on average over a tenth of a second; short bursts are faster"
SCRIPTS = Path(__file__).resolve().parent


def make(preset: str, profile: str, dtype: str, predictor: str, workdir: Path) -> tuple[Path, Path]:
    """The synthetic model, plain and repacked, made if it is not there."""
    name = f"opt-{preset}-{profile}" + ("" if dtype == "bfloat16" else f"-{dtype}")
    plain, packed = workdir / name, workdir / f"{name}-{predictor}"
    if not (packed / "config.json").exists():
        command = [sys.executable, str(SCRIPTS / "make_synthetic_opt.py"), str(plain), "--shape", preset, "--profile", profile]
        subprocess.run([*command, "--dtype", dtype, "--packed", str(packed), "--predictor", predictor], check=True)
    return plain, packed


def io_cgroups(proc: Path = Path("/proc")) -> tuple[Path, Path, bool]:
    """Where cgroups that limit I/O are made, the one that this process is in, and whether they are of version 2."""
    mounts = [row.split() for row in (proc / "mounts").read_text().splitlines()]
    own = [row.split(":", 2) for row in (proc / "self" / "cgroup").read_text().splitlines()]
    for _, place, kind, options, *_ in mounts:
        if kind == "cgroup" and "blkio" in options.split(","):
            here = next(path for _, controllers, path in own if "blkio" in controllers.split(","))
            return Path(place), Path(place) / here.lstrip("/"), False
    for _, place, kind, *_ in mounts:
        if kind == "cgroup2":
            return Path(place), Path(place) / next(path for number, _, path in own if number == "0").lstrip("/"), True
    raise OSError("no cgroups are mounted")


@contextmanager
def disk_class(standin: Path, name: str, proc: Path = Path("/proc")) -> Iterator[str]:
    """Make the stand-in a slower disk for this process and all that it starts meanwhile; gives the limits, in words."""
    root, here, unified = io_cgroups(proc)
    group = root / f"hf-flash-bench-{os.getpid()}"
    inner = group / "run" if unified else group  # version 2: caps on memory become groups beside it, below the same limit
    try:
        group.mkdir()
        if unified:
            (root / "cgroup.subtree_control").write_text("+io +memory")
            (group / "cgroup.subtree_control").write_text("+memory")
            inner.mkdir()
        command = [str(SCRIPTS / "standin_ssd"), "throttle", str(standin), group.name, name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(done.stderr.strip())
        (inner / "cgroup.procs").write_text(str(os.getpid()))
        yield done.stdout.strip().rpartition(": ")[2]
    finally:
        with suppress(OSError):
            (here / "cgroup.procs").write_text(str(os.getpid()))
        remove(inner)
        remove(group)


def remove(group: Path) -> None:
    """Take a cgroup away; the kernel may need a moment to notice that its processes have ended."""
    for _ in range(50):
        if not group.exists():
            return
        with suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.05)


def main() -> int:
    """Make the model if a preset asks for one, then run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["tiny", "125m", "1.3b", "2.7b", "6.7b"])
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="where the models are made, on the disk to measure")
    parser.add_argument("--profile", default="paper", help="of make_synthetic_opt.py (default paper)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="of the model (default bfloat16)")
    parser.add_argument("--predictor", choices=["quantized", "lowrank", "none"], default="quantized",
        help="of the model (default quantized: what a model has that was not calibrated)")  # fmt: skip
    parser.add_argument("--standin", type=Path, metavar="DIR", help="a stand-in disk that is up (scripts/standin_ssd)")
    parser.add_argument("--class", dest="disk_class", choices=["nvme", "sata"], help="what the stand-in is slowed down to")
    args, rest = parser.parse_known_args()
    if (args.standin is None) != (args.disk_class is None):
        parser.error("--standin and --class go together")
    if args.preset == "tiny":
        if args.standin:
            parser.error("--preset tiny is made where temporary files are, not on the stand-in")
        rest = ["--preset", "tiny", *rest]
    elif args.preset:
        if args.workdir is None:
            parser.error(f"--preset {args.preset} needs --workdir")
        if args.standin and not args.workdir.resolve().is_relative_to((args.standin / "disk").resolve()):
            parser.error(f"--workdir is not on the stand-in: name a folder in {args.standin / 'disk'}")
        plain, packed = make(args.preset, args.profile, args.dtype, args.predictor, args.workdir)
        rest = [str(packed), "--plain", str(plain), *rest]
    if not args.disk_class:
        return hf_flash_main(["bench", *rest])
    try:
        with disk_class(args.standin, args.disk_class) as limits:
            return hf_flash_main(["bench", *rest, "--note", NOTE.format(args.disk_class, limits)])
    except OSError as error:
        print(f"bench_decode: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
