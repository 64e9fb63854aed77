"""Predictors: they name the neurons that a token will use. The entry point is `choice.py`, with the table of their kinds."""
