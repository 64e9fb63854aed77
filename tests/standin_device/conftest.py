"""A device for this test run, where HF_FLASH_STANDIN_DEVICE names a folder to build it in; without, nothing here is a test.

    HF_FLASH_STANDIN_DEVICE=FOLDER HF_FLASH_TEST_DEVICE=standin:1 pytest tests/standin_device tests/runtime/test_on_device.py

The device stays in torch for the whole run. Copies are late and races are errors, unless a test says otherwise.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import torch

from hf_flash.compute.transfers import DRIVERS
from tests.standin_device.device import NAME, load

FOLDER = os.environ.get("HF_FLASH_STANDIN_DEVICE")


class StandinDriver:
    """Pins memory for the stand-in device."""

    def __init__(self, device: ModuleType) -> None:
        self._device = device

    def register(self, address: int, nbytes: int, device: torch.device) -> int:
        self._device.register_pinned(address, nbytes)
        return 0

    def unregister(self, address: int) -> None:
        self._device.unregister_pinned(address)


if FOLDER:
    module = load(Path(FOLDER))
    module.set_lazy(True)
    module.set_checked(True)
    DRIVERS[NAME] = StandinDriver(module)
else:
    collect_ignore_glob = ["*"]
