"""Base: helpers that every other room uses: sizes, arrays, buffers, files, folders, locks and the heap.

`sizes`, `files`, `folders`, `locks` and `heap` import neither numpy nor torch; `arrays` imports numpy, `buffers` torch.
"""
