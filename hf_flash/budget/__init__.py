"""Budget: what a number of bytes holds: the demand of tokens, the division among layers, the memory plan.

`divide_memory` in `divide.py` is the way in; what it returns is a `MemoryPlan` (`plan.py`).
"""
