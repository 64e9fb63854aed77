#!/usr/bin/env python3
"""Make the task `next_words` of examples/tasks from the held-out text: which of four continuations is the real one?

scripts/make_next_words.py     writes examples/tasks/next_words.jsonl
"""

import json
import random
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUESTIONS, BEFORE, AFTER, CHOICES = 150, 48, 8, 4  # words


def main() -> None:
    """Draw passages that do not overlap; the wrong continuations are other passages' right ones."""
    rng = random.Random(0)
    spans = []
    for name in ("bible", "sotu"):
        words = (ROOT / "examples" / "text" / f"{name}.valid.txt").read_text(encoding="utf-8").split()
        starts = range(0, len(words) - BEFORE - AFTER, BEFORE + AFTER)
        spans += [words[at : at + BEFORE + AFTER] for at in rng.sample(starts, QUESTIONS // 2)]
    ends = [" ".join(span[BEFORE:]) for span in spans]
    rows = []
    for number, span in enumerate(spans):
        wrong = rng.sample([end for i, end in enumerate(ends) if i != number], CHOICES - 1)
        choices = [*wrong, ends[number]]
        rng.shuffle(choices)
        rows.append({"query": " ".join(span[:BEFORE]), "choices": choices, "gold": choices.index(ends[number])})
    path = ROOT / "examples" / "tasks" / "next_words.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} questions")


if __name__ == "__main__":
    main()
