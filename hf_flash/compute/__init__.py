"""Compute: the arithmetic of neurons, by torch or by the compiled part, whose C sources are here.

`arithmetic_for` in `arithmetic.py` is the way in, `library` in `library.py` the one to the compiled part.
"""
