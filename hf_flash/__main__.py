"""`python -m hf_flash` is `hf-flash`."""

from .cli import main

raise SystemExit(main())
