"""Reading: bundles from the files of a store into rows of memory, while the caller does something else.

The entry point is `open_reader` in `reader.py`.
"""
