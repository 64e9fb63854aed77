"""Serving: transformers' OpenAI-compatible server around one model. `server.py` is the way in.

All that it needs of transformers' private parts is in `transformers_serving.py`.
"""
