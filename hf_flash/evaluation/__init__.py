"""Evaluation: what sparsity costs on a given text and on tasks, every stored predictor beside the dense model.

`evaluate` in `compare.py` is the way in.
"""
