"""What a run that is continued may change: what alters its result is refused by name, unless that
is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# What a checkpoint knows of files, whose fields are those of a section.
_SECTIONS = {
    "base": "model",
    "task": "model",
    "data": "data",
    "teacher": "distill",
    "teachers": "distill",
}


def changed(
    then: Mapping[str, Any], now: Mapping[str, Any], resume_with: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Name -> (value then, value now) of what differs between two runs' identities and is not named
    in `resume_with`.

    An identity maps names to values, and "settings" to those of `settings`. What is known of a
    section's files (the hash of the base, say) may change where a field of that section may.
    """
    sections = {name.partition(".")[0] for name in resume_with}
    accepted = {name for name, section in _SECTIONS.items() if section in sections} | set(
        resume_with
    )
    was, is_now = (
        {**{k: v for k, v in x.items() if k != "settings"}, **x.get("settings", {})}
        for x in (then, now)
    )
    missing = {"settings": (None, None)} if "settings" in now and "settings" not in then else {}
    differs = {
        k: (was.get(k), v) for k, v in is_now.items() if was.get(k) != v and k not in accepted
    }
    return missing or differs


def refusal(
    then: Mapping[str, Any], now: Mapping[str, Any], resume_with: Sequence[str], what: str
) -> str | None:
    """Why a run cannot go on from what one of identity `then` left, in one sentence; None where it
    can. `what` it left is said as in "the checkpoint in runs/one/checkpoints".
    """
    found, settings = changed(then, now, resume_with), now.get("settings", {})
    if not found:
        return None
    end = "use another output or resume=false"
    if "settings" in found:
        return (
            f"{what} does not say with which settings it was made, as an older version wrote it; "
            f"{end}"
        )
    named = [name for name in found if name in settings] or list(found)
    said = ", ".join(f"{name} ({found[name][0]!r}, now {found[name][1]!r})" for name in named)
    wish = (
        f", or resume_with=[{','.join(named)}] where that is wanted"
        if set(named) <= set(settings)
        else ""
    )
    return f"{what} was made with another {said}; set it back{wish}, {end}"
