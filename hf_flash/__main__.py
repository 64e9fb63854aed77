"""`python -m hf_flash` and the command `hf-flash`: Ctrl-C while the commands are imported is one line, too."""

import signal
import threading

from hf_flash.commands.interrupts import end_at_once

_is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
_may_handle = _is_default and threading.current_thread() is threading.main_thread()
if _may_handle:
    signal.signal(signal.SIGINT, end_at_once)
from hf_flash.commands.main import program  # noqa: E402

if _may_handle:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if __name__ == "__main__":
    raise SystemExit(program())
