"""Hub: save and share a loaded model or a repacked folder, with a model card that says what was measured.

This room may import everything from `errors` up to `evaluation`; `serving`, `quantizer` and the commands may import it.
"""
