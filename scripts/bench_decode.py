#!/usr/bin/env python3
"""`hf-flash bench` on the shapes of real models whose weights need not be downloaded: synthetic ones, made in --workdir.

    scripts/bench_decode.py --preset 2.7b --workdir DIR [--profile paper] [any option of hf-flash bench]

The model is made once (scripts/make_synthetic_opt.py: random weights, sparsity and overlap of tokens as in the paper) and takes
twice its size on disk, plain and repacked: 11 GB for 2.7b, 27 GB for 6.7b. Without --preset it is `hf-flash bench`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from hf_flash.cli import main as hf_flash_main


def make(preset: str, profile: str, workdir: Path) -> tuple[Path, Path]:
    """The synthetic model, plain and repacked, made if it is not there."""
    plain, packed = workdir / f"opt-{preset}-{profile}", workdir / f"opt-{preset}-{profile}-flash"
    if not (packed / "config.json").exists():
        script = Path(__file__).with_name("make_synthetic_opt.py")
        command = [sys.executable, str(script), str(plain), "--shape", preset, "--profile", profile, "--dtype", "bfloat16"]
        subprocess.run([*command, "--packed", str(packed), "--predictor", "lowrank"], check=True)
    return plain, packed


def main() -> int:
    """Make the model if a preset asks for one, then run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["tiny", "2.7b", "6.7b"])
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="where the models are made, on the disk to measure")
    parser.add_argument("--profile", default="paper", help="of make_synthetic_opt.py (default paper)")
    args, rest = parser.parse_known_args()
    if args.preset in (None, "tiny"):
        return hf_flash_main(["bench", *(["--preset", "tiny"] if args.preset else []), *rest])
    if args.workdir is None:
        parser.error(f"--preset {args.preset} needs --workdir")
    plain, packed = make(args.preset, args.profile, args.workdir)
    return hf_flash_main(["bench", str(packed), "--plain", str(plain), *rest])


if __name__ == "__main__":
    sys.exit(main())
