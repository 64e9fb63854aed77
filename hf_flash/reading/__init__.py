"""Reading: bundles from the files of a store into rows of memory, while the caller does something else.

May import errors, base, machine, store and compute.
"""
