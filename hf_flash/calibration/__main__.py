"""`python -m hf_flash.calibration`, which `accelerate launch -m` runs in several processes."""

import sys

from hf_flash.commands.calibrate import main

if __name__ == "__main__":
    sys.exit(main())
