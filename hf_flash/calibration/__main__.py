"""`python -m hf_flash.calibration`: `hf-flash calibrate` in several processes, which `accelerate launch -m` starts."""

from __future__ import annotations

import argparse
import os
import sys

from hf_flash.commands.arguments import say
from hf_flash.commands.calibration_table import describe
from hf_flash.commands.run_calibrate import add_calibration_arguments, calibration_report
from hf_flash.errors import HfFlashError


def main() -> int:
    """Calibrate, and print the table in the first process. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hf_flash.calibration", description="`hf-flash calibrate`")
    add_calibration_arguments(parser)
    try:
        table = describe(calibration_report(parser.parse_args()))
    except HfFlashError as error:
        print(f"hf-flash: {error}", file=sys.stderr)  # noqa: T201
        return 1
    if int(os.environ.get("RANK", "0")) == 0:
        say(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
