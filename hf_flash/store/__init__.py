"""Store: the format of flash files, what a unit is, reading and writing checkpoints.

May import errors, base, config and machine.
"""
