"""`python -m hf_flash` is `hf-flash`."""

from hf_flash.commands.main import program

raise SystemExit(program())
