"""`hf-flash serve`: transformers' OpenAI-compatible server around one model. It imports `runtime` and the rooms below it.

All that it needs of transformers' private parts is in `transformers_serving`. Only `commands` imports this room.
"""
