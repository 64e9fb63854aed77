"""`hf-flash plan`: how fast a model will be on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from hf_flash.commands.arguments import DTYPES, add_json, finish, positive, tell
from hf_flash.config_arguments import AUTO, PredictorName, ReaderName


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hf-flash plan`."""
    add = parser.add_argument
    add("model", help="folder or Hub repository, repacked or plain; config.json is enough")
    add("--memory", "--memory-budget", metavar="SIZE", help='weights in DRAM: a size, or a share of the model such as "50%%"')
    add("--predictor", choices=get_args(PredictorName), help="default: the stored one, else quantized")
    add("--dtype", choices=DTYPES[1:], help="of compute (default: the checkpoint's)")
    add("--disk", type=Path, metavar="FOLDER", help="whose disk to measure (default: the model's or the cache's)")
    add("--active", type=float, metavar="X", help="share of the neurons that are active (default: as calibrated)")
    add("--fresh", type=float, metavar="X", help="of these, not used in 4 tokens (default: as calibrated)")
    add("--predicted", type=float, metavar="X", help="neurons predicted for an active one (default: as calibrated)")
    add("--tokens", type=positive, metavar="N", help="predict the mean of so many (default: in the long run)")
    add("--prompt-tokens", type=positive, metavar="N", default=16, help="before these (default 16)")
    add("--reader", choices=get_args(ReaderName), default=AUTO, help="as loading would choose (default)")
    add("--assistant", metavar="MODEL", help="a model that drafts for it: divide --memory between the two")
    add("--draft-tokens", type=positive, metavar="N", help="that it proposes at a time (default 4)")
    add("--revision", help="branch, tag or commit on the Hub")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """`hf-flash plan`. Returns the exit code."""
    from hf_flash.planning import pairing, planner

    options = {name: getattr(args, name) for name in (
        "memory", "predictor", "dtype", "disk", "active", "fresh", "predicted", "tokens", "prompt_tokens", "reader", "revision",
    )}  # fmt: skip
    found: planner.Plan | planner.ExpertOutlook | pairing.Pair
    if args.assistant:
        drafts = args.draft_tokens or pairing.DRAFT_TOKENS
        found = pairing.plan_pair(args.model, args.assistant, draft_tokens=drafts, **options)
    else:
        found = planner.plan(args.model, **options)
    tell(args, found.describe())
    finish(args, found.to_dict())
    return 0
