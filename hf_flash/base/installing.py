"""How hf_flash is installed: the one place that says it. It is on no package index."""

from __future__ import annotations

from typing import Final

UPDATE: Final = "update hf_flash: git pull in its repository, then pip install ."


def with_extra(extra: str) -> str:
    """How to install what an extra of pyproject.toml brings."""
    return f'in the repository of hf_flash: pip install ".[{extra}]"'
