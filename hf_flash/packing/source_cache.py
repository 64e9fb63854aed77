"""Removing a source's weights from the Hub's cache, once its repacked copy is known to hold every one of them."""

from __future__ import annotations

import logging
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.utils import tqdm

from hf_flash.base.heap import trim_heap
from hf_flash.base.sizes import format_bytes
from hf_flash.errors import RepackError
from hf_flash.store.checkpoint import Checkpoint, find_snapshot
from hf_flash.store.layout import FlashStore
from hf_flash.store.writer import unbundle

logger = logging.getLogger("hf_flash")


def delete_source(source: Checkpoint, target: Path) -> int:
    """Remove a checkpoint's weight files from the Hub's cache, if `target` holds every tensor of it bit for bit.

    Files that other revisions use stay, and so does everything that is not one of these files: the Hub cache's own deletion
    ensures that. The removed files can be downloaded again.

    Args:
        source: a snapshot in the Hub's cache.
        target: the repacked folder.

    Returns:
        The bytes that were freed.

    Raises:
        RepackError: the source is not in the Hub's cache, or `target` lacks a tensor or has another value; nothing was deleted.
        StoreError: `target` is damaged; nothing was deleted.
    """
    snapshot = find_snapshot(source.files[0].parent)
    if snapshot is None:
        raise RepackError("not in the Hub's cache: nothing was deleted", where=source.files[0].parent)
    _compare(source, target)
    source.release()
    info = huggingface_hub.scan_cache_dir(snapshot.cache)
    cached = [file for repo in info.repos for revision in repo.revisions for file in revision.files]
    strategy = info.delete_files(*(file for file in cached if file.file_path in source.files))
    strategy.execute()
    logger.info("hf_flash: removed the weights of %s, %s", snapshot.name, format_bytes(strategy.expected_freed_size))
    return int(strategy.expected_freed_size)


def _compare(source: Checkpoint, target: Path) -> None:
    """Compare both, one tensor at a time. Raises `RepackError` where they differ."""
    store, packed = FlashStore.open_folder(target), Checkpoint.open_folder(target)
    layers = {layer.names[0]: layer for layer in store.layers}
    names = [name for name in source.specs if name not in store.ffn_names]
    for name in tqdm([*layers, *names], desc="Comparing with the source", unit="tensor", delay=1):
        if name in layers:
            found = dict(zip(layers[name].names, unbundle(layers[name]), strict=True))
        else:
            found = {name: packed.tensor(name)} if name in packed.specs else {}
        for wanted in list(found) or [name]:
            if wanted not in found or not _identical(found.pop(wanted), source.tensor(wanted)):
                raise RepackError(
                    "the repacked folder is not what the source is: nothing was deleted",
                    where=f"{target}: {wanted}",
                    hint="the disk may be damaged: repack again, to another folder",
                )
        trim_heap()


def _identical(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors are equal bit for bit, NaN included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))
