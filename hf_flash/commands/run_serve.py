"""`hf-flash serve`: a flash model behind transformers' own OpenAI-compatible server."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_flash.base.installing import with_extra
from hf_flash.commands.arguments import DTYPES, port, say, size
from hf_flash.config_arguments import ARGUMENTS
from hf_flash.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hf-flash serve`; those of the group "flash" come from the table of config arguments."""
    add = parser.add_argument
    add("model", help="folder or Hub repository, repacked or plain; name@revision for another revision")
    add("--host", default="localhost", help="address to listen on (default localhost)")
    add("--port", type=port, default=8000, help="port to listen on; 0 takes a free one (default 8000)")
    add("--chat-template", type=Path, metavar="FILE", help="Jinja template for a model without one")
    add("--dtype", choices=DTYPES, default="auto", help="of compute")
    add("--attn-implementation", choices=["eager", "sdpa"], help="default: transformers' choice")
    add("--continuous-batching", action="store_true", help="decode requests together, sampled as the first says")
    add("--kv-cache", type=size, default="1GiB", metavar="SIZE", help="for continuous batching (default 1GiB)")
    add("--enable-cors", action="store_true", help="let web pages from anywhere call it")
    add("--log-level", choices=["error", "warning", "info", "debug"], default="info", help="default info")
    flash = parser.add_argument_group("flash", "arguments of FlashOffloadConfig; what is left out is as the model stores it")
    for argument in sorted(ARGUMENTS.values(), key=lambda argument: argument.name != "memory_budget"):  # the usual one first
        flash.add_argument(f"--{argument.name.replace('_', '-')}", **argument.option)


def run(args: argparse.Namespace) -> int:
    """`hf-flash serve`. Returns the exit code when the server ends."""
    from hf_flash.config import configure

    try:
        from hf_flash.serving.server import Server
    except ImportError as error:
        raise ConfigError("serving needs more packages", got=error, hint=with_extra("serve")) from error
    configure(**{name: getattr(args, name) for name in ARGUMENTS})
    server = Server(
        args.model, host=args.host, port=args.port, dtype=args.dtype, attn_implementation=args.attn_implementation,
        chat_template=args.chat_template, kv_cache_bytes=args.kv_cache if args.continuous_batching else None,
        enable_cors=args.enable_cors, log_level=args.log_level,
    )  # fmt: skip
    say(server.describe())
    server.run()
    return 0
