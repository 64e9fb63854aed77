"""Packing: plain checkpoints to stores and back, folders with a store, the flash cache.

May import everything up to `predictors`.
"""
