"""Evaluation: what sparsity costs on a given text and on tasks, every stored predictor beside the dense model.

This room may import everything from `errors` up to `bench`; `hub`, `serving` and the commands may import it.
"""
