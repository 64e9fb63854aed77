"""Runtime: a loaded model. Start with `layer.py`, the main path of a token; `attach.py` puts a loaded model together."""
