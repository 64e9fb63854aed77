"""Compute: the arithmetic of neurons, by torch or by the compiled part, whose C sources are here.

May import errors, base, machine and store.
"""
