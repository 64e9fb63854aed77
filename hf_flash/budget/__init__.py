"""Budget: what a number of bytes holds: demand of tokens, division among layers, the memory plan.

May import everything up to `packing`.
"""
