"""Runtime: a loaded model. Start with layer.py, the main path of a token.

May import everything up to `budget`.
"""
