"""`python -m hf_flash` and the command `hf-flash`: Ctrl-C while the commands are imported is one line, too."""

import os
import signal
import threading
from typing import NoReturn


def _interrupted(*_: object) -> NoReturn:
    os.write(2, b"hf-flash: interrupted\n")
    os._exit(130)


_is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
_may_handle = _is_default and threading.current_thread() is threading.main_thread()
if _may_handle:
    signal.signal(signal.SIGINT, _interrupted)
from hf_flash.commands.main import program  # noqa: E402

if _may_handle:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if __name__ == "__main__":
    raise SystemExit(program())
