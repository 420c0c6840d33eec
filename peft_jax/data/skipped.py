"""What was passed over while data was made ready, and why: told as it happens, and in a table."""

from __future__ import annotations

import collections
import logging
import re

logger = logging.getLogger("peft_jax")


class MalformedRecordError(ValueError):
    """A record that cannot be used, named by file and line."""


class Skipped:
    """Counts what is passed over by its reason, with one example of each."""

    def __init__(self, shown: int = 5) -> None:
        self.shown = shown
        self.reasons: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, str] = {}

    def __len__(self) -> int:
        return sum(self.reasons.values())

    def add(self, error: Exception | str, told: bool = True) -> None:
        """One more; the first few are logged."""
        text = str(error)
        reason = _reason(text)
        self.reasons[reason] += 1
        self.examples.setdefault(reason, text)
        if told and len(self) <= self.shown:
            logger.warning("%s (record skipped)", text)

    def tell(self, what: str) -> None:
        """Log how many there are in all, where they were not all told."""
        if len(self) > self.shown:
            logger.warning("%s: %d malformed records skipped in all", what, len(self))

    def table(self) -> str:
        """A line for each reason: how many, and an example; one reason ends the sentence before
        it, and nothing is said where nothing was skipped.
        """
        if not self.reasons:
            return ""
        if len(self.reasons) == 1:
            ((reason, count),) = self.reasons.items()
            return f"; {count:,} skipped, as {_short(self.examples[reason])}"
        lines = ["", f"{'records':>9}  reason, as in"]
        for reason, count in self.reasons.most_common():
            lines.append(f"{count:>9,}  {_short(self.examples[reason])}")
        return "\n".join(lines)


def _reason(text: str) -> str:
    """An error's text without what differs from record to record."""
    said = text.partition(": ")[2] or text
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d[\d,]*|\(fields here: .*\)", "_", said)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:197]}..."
