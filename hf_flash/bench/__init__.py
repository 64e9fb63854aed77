"""Bench: decode speed of systems side by side, each in a process and under a memory cap of its own; reports and drawings.

`bench` in `run.py` is the way in.
"""
