"""Store: the format of flash files, the layout of a unit, and reading and writing checkpoints.

`FlashStore` in `layout.py` is an opened store, `Checkpoint` in `checkpoint.py` a plain checkpoint.
"""
