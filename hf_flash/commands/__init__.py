"""The command `hf-flash`. Parsing a command line imports nothing heavy.

`main.py` has the entry point and a table of the commands. Each command has a module `run_NAME.py` with `add_arguments(parser)`
and `run(args)`, which returns the exit code. These modules are imported to show a help text, so they import torch,
transformers, numpy, rich and what needs them inside `run`. The other modules here are what the larger commands consist of.
"""
