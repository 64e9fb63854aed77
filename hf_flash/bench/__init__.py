"""Bench: decode speed of systems side by side, each in a process and under a memory cap of its own; reports and drawings.

This room may import everything from `errors` up to `planning`; `evaluation`, `hub`, `serving` and the commands may import it.
"""
