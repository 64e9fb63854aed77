"""Packing: plain checkpoints to stores and back, folders with a store, the flash cache.

The entry points are `repack` and `restore` in `repacking.py`, and `cached_store` in `flash_cache.py` when a model is loaded.
"""
