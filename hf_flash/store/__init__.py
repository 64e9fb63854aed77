"""Store: the format of flash files, what a unit is, reading and writing checkpoints.

`FlashStore` in `layout.py` is an opened store, `Checkpoint` in `checkpoint.py` a plain checkpoint.
"""
