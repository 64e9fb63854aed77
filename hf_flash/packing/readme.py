"""README.md as a model card with a part of ours: adding that part, replacing it and taking it out.

---                                       front matter: the source's, with our entries merged into it
---
<!-- hf_flash: ... -->                    our part, between comments; the first two say what may be edited, and hold the
...                                       source's front matter, so that it can be restored
<!-- hf_flash: end -->
                                          the source's card, or whatever else was there, unchanged
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from hf_flash.errors import ConfigError

_BEGIN: Final = "<!-- hf_flash: this part is written again by every push; what is below it is kept -->"
_BEFORE: Final = "<!-- hf_flash: front matter without it: {} -->"
_END: Final = "<!-- hf_flash: end -->\n\n"
_OURS: Final = re.compile(
    re.escape(_BEGIN) + "\n" + re.escape(_BEFORE).replace(r"\{\}", "(?P<before>[^\n]*)") + "\n.*?" + re.escape(_END.strip())
    + "\n{0,2}", re.DOTALL,
)  # fmt: skip


def merged(text: str, entries: Mapping[str, Any], part: str) -> str:
    """Return a card with our entries and our part in it; those of an earlier call are replaced.

    Args:
        text: the card so far; may be empty.
        entries: for the front matter. Tags are added to the existing tags; other entries replace existing ones.
        part: Markdown.

    Raises:
        ConfigError: the front matter cannot be read.
    """
    front, before, rest = _divide(text)
    data = _front_matter(front)
    for name, value in entries.items():
        data[name] = list(dict.fromkeys([*(data.get(name) or []), *value])) if name == "tags" else value
    kept = json.dumps(front if before is None else before).replace("<", "\\u003c").replace(">", "\\u003e")
    return f"---\n{data.to_yaml()}\n---\n{_BEGIN}\n{_BEFORE.format(kept)}\n{part}\n{_END}{rest}"


def body(text: str) -> str:
    """Return the text of a card without its front matter and our part."""
    return _divide(text)[2]


def without_ours(text: str) -> str:
    """Return the card as it was before [`merged`]; a card without our part is returned unchanged."""
    _, before, rest = _divide(text)
    return text if before is None else before + rest


def _divide(text: str) -> tuple[str, str | None, str]:
    """Split a card into its front matter, the front matter before ours (`None` without our part), and the text without it."""
    match = REGEX_YAML_BLOCK.search(text)
    front = match[0] if match else ""
    rest = text[len(front) :]
    ours = _OURS.search(rest)
    if ours is None:
        return front, None, rest
    return front, str(json.loads(ours["before"])), rest[: ours.start()] + rest[ours.end() :]


def _front_matter(front: str) -> ModelCardData:
    if not front:
        return ModelCardData()
    try:
        return ModelCard(front, ignore_metadata_errors=True).data
    except Exception as error:
        raise ConfigError(
            "the front matter of the model card cannot be read",
            where="README.md",
            got=str(error).splitlines()[0],
            hint="mend the YAML between the two lines of `---`; the Hub would refuse it too",
        ) from error
