"""Budget: what a number of bytes holds: the demand of tokens, the division among layers, the memory plan.

The entry point is `divide_memory` in `divide.py`. It returns a `MemoryPlan` (`plan.py`).
"""
