"""Predictors: which neurons a token will use. One table of the kinds that there are (choice.py).

May import everything up to `families`.
"""
