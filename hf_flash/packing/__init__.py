"""Packing: plain checkpoints to stores and back, folders with a store, the flash cache.

`repack` and `restore` in `repacking.py` are the way in, and `cached_store` in `flash_cache.py` for a model that is loaded.
"""
