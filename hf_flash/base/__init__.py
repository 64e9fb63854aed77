"""Sizes, arrays, buffers, files, folders, locks and the heap: what every other room uses. Of ours it imports only `errors`.

`sizes`, `files`, `folders`, `locks` and `heap` import neither numpy nor torch; `arrays` imports numpy, `buffers` torch.
"""
