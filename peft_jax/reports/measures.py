"""What recipes are compared by: each measure with its unit, and which way is better."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

Numbers = Mapping[str, Any]


class Measure(NamedTuple):
    """A number of a run. `timed` ones vary from run to run and count as other from 10% on, others
    from 1% on; of `scored` ones the spread over seeds decides.
    """

    key: str
    title: str
    better: Literal["lower", "higher"]
    gain: str  # what is said of a better one, with {} for the ratio or difference
    unit: Literal["", "bytes", "giga"] = ""
    kind: Literal["counted", "timed", "scored"] = "counted"


HIGHER = ("accuracy", "exact_match", "bleu", "rouge", "f1", "matthews", "pearson", "spearman")


def measures(quality: str) -> tuple[Measure, ...]:
    """All of them, of which `quality` names the metric of the task."""
    way: Any = "higher" if quality in HIGHER else "lower"
    return (
        Measure("quality", quality, way, f"{quality} better by {{}}", kind="scored"),
        Measure("forgetting", "forgetting", "lower", "{} nats less forgotten", kind="scored"),
        Measure("trained", "trained parameters", "lower", "{}× fewer trained parameters"),
        Measure("kept", "stored parameters", "lower", "{}× fewer parameters to store"),
        Measure("disk", "on disk", "lower", "{}× fewer bytes on disk", "bytes"),
        Measure("device", "on the device", "lower", "{}× fewer bytes on the device", "bytes"),
        Measure("memory", "memory of a step", "lower", "{}× less memory in a step", "bytes"),
        Measure("flops", "GFLOP of a step", "lower", "{}× fewer FLOPs in a step", "giga"),
        Measure("step_seconds", "step, s", "lower", "{}× faster steps", kind="timed"),
        Measure("train_seconds", "training, s", "lower", "{}× less training time", kind="timed"),
        Measure(
            "tokens_per_second",
            "generation, tokens/s",
            "higher",
            "generates {}× as fast",
            kind="timed",
        ),
    )


class Summary(NamedTuple):
    """A number over seeds: its mean, its standard deviation (None of a single one), and each."""

    mean: float | None
    spread: float | None
    values: list[float | None]


def summary(values: Sequence[float | None]) -> Summary:
    """Of what is known of each run; of nothing where one of them has no number."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known or len(known) < len(values):
        return Summary(None, None, list(values))
    spread = statistics.stdev(known) if len(known) > 1 else None
    return Summary(statistics.fmean(known), spread, list(values))


class Verdict(NamedTuple):
    """How a recipe stands to the reference in one measure: gain, cost, or neither."""

    key: str
    sign: int  # 1 better, -1 worse, 0 the same within the measure's own accuracy
    ratio: float | None  # how many times better; of scored measures None
    difference: float  # this one's mean less the reference's
    said: str


TIMED, COUNTED = 1.1, 1.01


def verdict(measure: Measure, mine: Summary, other: Summary) -> Verdict | None:
    """This recipe beside the reference; None where one of them has no number."""
    if mine.mean is None or other.mean is None:
        return None
    difference = mine.mean - other.mean
    way = -1.0 if measure.better == "lower" else 1.0
    if measure.kind == "scored":
        noise = math.hypot(mine.spread or 0.0, other.spread or 0.0)
        sign = 0 if abs(difference) <= noise else int(math.copysign(1, way * difference))
        said = measure.gain.format(f"{abs(difference):.3g}")
        if sign < 0:
            said = said.replace("better", "worse").replace("less", "more")
        return Verdict(measure.key, sign, None, difference, said)
    if not mine.mean or not other.mean:
        return None
    ratio = other.mean / mine.mean if measure.better == "lower" else mine.mean / other.mean
    limit = TIMED if measure.kind == "timed" else COUNTED
    sign = 1 if ratio >= limit else -1 if ratio <= 1 / limit else 0
    return Verdict(measure.key, sign, ratio, difference, _said(measure, ratio))


def _said(measure: Measure, ratio: float) -> str:
    """A gain in words, and a cost as the share of the reference that it takes."""
    if ratio >= 1.0:
        return measure.gain.format(f"{ratio:.3g}")
    if measure.better == "higher":
        return f"{measure.title}: {ratio:.3g}× that of the reference"
    return f"{measure.title}: {1 / ratio:.3g}× that of the reference"


def spread_of(found: Summary) -> str:
    """mean ± spread, as tables show it."""
    if found.mean is None:
        return "–"
    if found.spread is None:
        return f"{found.mean:.4g}"
    digits = max(0, min(6, 1 - math.floor(math.log10(abs(found.spread) or 1e-3))))
    return f"{found.mean:.{digits}f} ± {found.spread:.{digits}f}"
