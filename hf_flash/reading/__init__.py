"""Reading: bundles from the files of a store into rows of memory, while the caller does something else.

`open_reader` in `reader.py` is the way in.
"""
