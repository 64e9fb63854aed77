"""`python -m hf_flash.calibrate`: what `accelerate launch -m hf_flash.calibrate` runs in several processes (calibration.py)."""

import sys

from .calibration import main

if __name__ == "__main__":
    sys.exit(main())
