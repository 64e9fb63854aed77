"""Compute: the arithmetic of neurons, by torch or by the compiled part, whose C sources are in this folder.

The entry points are `arithmetic_for` in `arithmetic.py` and, for the compiled part, `library` in `library.py`.
"""
