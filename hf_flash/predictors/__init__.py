"""Predictors: they say which neurons a token will use. `choice.py` has the table of their kinds and is the way in."""
