"""What is learnt of conversations in every chat template that trl ships.

    PYTHONPATH=. python scripts/chat_templates.py --out benchmarks/results/chat_templates.md

Each cell compares `encode_chat` with the mask of trl's training variant of the template, token for
token, or, where trl has none, with the assistant's turns and the tokens that end them.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import logging
from datetime import UTC, datetime
from pathlib import Path

from tests.data.trl_templates import CASES, names, variant_of, verdict

WORDS = {
    "equal": "=",
    "turns": "turns",
    "refused": "refused",
    "calls left out": "no calls",
    "other": "other",
}
LEGEND = """\
`=`: the learnt tokens are those of the training variant's mask, token for token, without an empty
block of reasoning (which the variants teach and which is not learnt here); "n rows" where the
template rewrites earlier turns, each row then against the variant on the conversation up to its
turn. `turns`: trl has no variant; the learnt text is the assistant's turns with the token that
ends each. `refused`: the template itself raises, and its message is the record's error. `no calls`:
the template leaves tool calls out (its variant teaches an empty turn there); that turn is not
learnt and a warning says so. `other`: see below the table.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    logging.getLogger("peft_jax").setLevel(logging.ERROR)
    counts: collections.Counter[str] = collections.Counter()
    lines = [f"| template | variant | {' | '.join(CASES)} |", "|---" * (len(CASES) + 2) + "|"]
    notes = []
    for name in names():
        cells = []
        for case in CASES:
            word, said = verdict(name, case)
            counts[word] += 1
            rows = f" {said}" if word == "equal" and said else ""
            cells.append(WORDS.get(word, word) + rows)
            if word in ("other", "refused"):
                notes.append(f"- {name}, {case}: {_note(word, said)}")
        has = "yes" if variant_of(name) is not None else "no"
        lines.append(f"| {name} | {has} | {' | '.join(cells)} |")
    total = ", ".join(f"{WORDS.get(w, w)} {n}" for w, n in counts.most_common())
    version = importlib.metadata.version("trl")
    title = f"# Chat templates\n\n{datetime.now(UTC):%Y-%m-%d}.\n"
    body = "\n".join(
        [
            title,
            f"Templates of trl {version}. {LEGEND}",
            f"In all: {total}.",
            "",
        ]
    )
    text = "\n".join([body, *lines, "", *notes, ""])
    print(text)
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")


def _note(word: str, said: object) -> str:
    if word == "refused":
        return f"refused: {said}"
    ours, theirs = said  # type: ignore[misc]
    return f"here `{ours!r}`, the variant `{theirs!r}`"


if __name__ == "__main__":
    main()
