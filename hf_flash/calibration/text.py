"""Text to tokens: what calibration learns from and evaluation is measured on.

Text is a file (documents separated by form feeds), the name of a dataset for the `datasets` library, or token ids.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import AutoTokenizer

from hf_flash.base.files import nearest
from hf_flash.base.installing import with_extra
from hf_flash.errors import CalibrationError, ConfigError

Text = str | os.PathLike[str] | torch.Tensor | Sequence[int]
_PART: Final = 100_000  # characters tokenized at a time
_KINDS: Final = "name a UTF-8 file, or a dataset as name:config:split"
_GRAM: Final = 32  # tokens in a quotation
_KEPT: Final = 16  # one quotation in sixteen is kept


def text_name(text: Text) -> str | None:
    """A text's name: that of its dataset, or of its file without the folder; `None` for token ids."""
    if not isinstance(text, str | os.PathLike):
        return None
    return Path(text).name if Path(text).is_file() else str(text)


def token_windows(
    folder: Path, text: Text, context: int, vocab_size: int, *, most: int, seed: int | None = None, least: int = 1
) -> torch.Tensor:
    """Cut a text into disjoint windows of tokens, int64 [windows, context].

    Args:
        folder: the folder with the tokenizer.
        text: the text; see the module.
        context: tokens in a window.
        vocab_size: the model's; token ids must be below it.
        most: the most windows to return.
        seed: take windows from all over the text, shuffled; `None`: from its beginning, in order.
        least: fewer windows are an error.

    Raises:
        CalibrationError: the text cannot be read, is empty or too short, or its tokens do not fit the model.
        ConfigError: there is no such text.
    """
    wanted = most * context
    random = None if seed is None else np.random.default_rng(seed)
    if named := isinstance(text, str | os.PathLike):
        ids = _tokenize(folder, _parts(text, random), wanted if random is None else 4 * wanted)
    else:
        try:
            ids = np.asarray(text).reshape(-1)
        except (TypeError, ValueError) as error:
            kind = getattr(text, "dtype", error)
            raise CalibrationError("token ids must be whole numbers", where="text", got=kind) from error
        if ids.dtype.kind not in "iu" and len(ids):
            raise CalibrationError("token ids must be whole numbers", where="text", got=ids.dtype)
    if len(ids) and not (0 <= ids.min() and ids.max() < vocab_size):
        raise CalibrationError(
            "the tokenizer does not fit the model" if named else "the token ids are not the model's",
            where=folder if named else "text",
            expected=f"token ids from 0 to {vocab_size - 1}",
            got=f"{ids.min()} to {ids.max()}",
            hint="put the model's own tokenizer into the folder" if named else "tokenize with the model's own tokenizer",
        )
    count = len(ids) // context
    if count < least:
        raise CalibrationError(
            "the text is empty" if not len(ids) else "the text is too short",
            where=text if named else "text",
            expected=f"at least {least} windows of {context} tokens, {least * context} in all",
            got=f"{len(ids)} tokens",
            hint="give more text, or a smaller context",
        )
    windows = torch.from_numpy(ids[: count * context].astype(np.int64)).view(count, context)
    order = np.arange(count) if random is None else random.permutation(count)
    return windows[torch.from_numpy(order[:most])]


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer in a checkpoint's folder.

    Raises:
        CalibrationError: there is none.
    """
    if not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):  # transformers would make an empty one
        hint = "save the model's tokenizer there, or give token ids"
        raise CalibrationError("there is no tokenizer for the text", where=folder, hint=hint)
    return AutoTokenizer.from_pretrained(folder)


def _tokenize(folder: Path, parts: Iterator[str], wanted: int) -> Any:
    tokenizer = tokenizer_of(folder)
    ids: list[int] = []
    for part in parts:
        if part.strip():
            ids += tokenizer(part, verbose=False)["input_ids"]
        if len(ids) >= wanted:
            break
    return np.asarray(ids, dtype=np.int64)


def _parts(text: str | os.PathLike[str], random: np.random.Generator | None) -> Iterator[str]:
    """The documents of a text, long ones in parts. Those of a file are shuffled if `random` is given."""
    path = Path(text)
    if path.is_dir() or not str(text):
        raise ConfigError("not a text", where="text", expected="a file, or the name of a dataset", got=repr(str(text)))
    if not path.is_file():
        yield from _dataset(os.fspath(text))
        return
    try:
        documents = path.read_text(encoding="utf-8").split("\f")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError("the text cannot be read", where=path, expected="UTF-8", got=str(error)) from error
    parts = [document[at : at + _PART] for document in documents for at in range(0, len(document), _PART)]
    yield from parts if random is None else (parts[i] for i in random.permutation(len(parts)))


def check_text(text: str | os.PathLike[str]) -> None:
    """Look at the first words of a text, before work that takes long.

    Raises:
        ConfigError, CalibrationError: there is no such text, or it cannot be read.
    """
    next(_parts(text, None), None)


def _names_file(name: str) -> bool:
    """Whether a text that is no file was meant to be one, and not a dataset: datasets are `name` or `owner/name`, and so on."""
    path = Path(name.partition(":")[0])
    is_suffix = re.fullmatch(r"\.[a-z]{2,5}", path.suffix) is not None  # and not that of a version, as in datasets' names
    return is_suffix or path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2


def _dataset(name: str) -> Iterator[str]:
    """The texts of a dataset: `name`, `name:config` or `name:config:split`, streamed."""
    if _names_file(name):
        folder = Path(name).expanduser().parent
        other = _KINDS if folder.is_dir() else f"there is no folder {folder}"
        raise ConfigError("no such file", where="text", got=name, hint=nearest(Path(name), Path.is_file) or other)
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            "no such file; a dataset of that name needs the datasets library", where="text", got=name, hint=with_extra("eval")
        ) from error
    path, config, split = [*name.split(":"), "", ""][:3]
    try:
        rows = datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError) as error:
        raise ConfigError("neither a file nor a dataset", where="text", got=name, hint=str(error)) from error
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise ConfigError("the dataset has no column `text`", where=name, got=", ".join(row))
        yield row["text"]


def quotations(windows: torch.Tensor) -> torch.Tensor:
    """Fingerprints of a sample of the quotations, runs of 32 tokens, in `windows` [windows, context]; int64, sorted.

    The sample depends on the tokens alone: two texts that share a passage share its fingerprints.
    """
    ids = windows.numpy().astype(np.uint64) + np.uint64(1)
    runs = ids.shape[1] - _GRAM + 1
    if runs < 1:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    sums = np.zeros((len(ids), runs), dtype=np.uint64)
    for at in range(_GRAM):  # wraps around modulo 2 ** 64, as a hash may
        sums = sums * np.uint64(0x9E3779B97F4A7C15) + ids[:, at : at + runs]
    sums ^= sums >> np.uint64(29)
    kept = sums[(sums >> np.uint64(7)) % np.uint64(_KEPT) == 0]
    return torch.from_numpy(np.unique(kept.view(np.int64)))


def seen_share(windows: torch.Tensor, before: torch.Tensor) -> float:
    """Share of the quotations in `windows` [windows, context] that are among `before`, the [`quotations`] of other text."""
    mine = quotations(windows).numpy()
    return float(np.isin(mine, before.numpy()).mean()) if len(mine) else 0.0
