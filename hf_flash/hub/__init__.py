"""Hub: save and share a loaded model or a repacked folder, with a model card that says what was measured.

`give_flash_class` in `saving.py` gives a loaded model its own `save_pretrained`; `push` there uploads.
"""
