"""What a run that is continued may change: each field of the configuration alters what is trained,
or it does not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

_MODEL = ("path", "revision", "dtype", "task", "adapter", "fresh", "config", "scan_layers", "roles")
_QUANTIZE = (
    "format",
    "options",
    "rounding",
    "rounding_options",
    "targets",
    "exclude",
    "calibration_batches",
    "token_cap",
)
_PRUNE = (
    "sparsity",
    "pattern",
    "score",
    "score_options",
    "distribution",
    "distribution_options",
    "targets",
    "exclude",
    "mask_updates",
    "keep",
    "keep_parameters",
    "by",
    "importance",
    "compensate",
    "calibration_batches",
)
_SOURCE = ("path", "split", "limit", "phrasing", "part")
_DATA = (
    "kind",
    "columns",
    "delimiter",
    "labels",
    "label_kind",
    "sequence_length",
    "target_length",
    "stride",
    "templates",
    "held_out",
    "unseen",
    "replay",
    "replay_share",
    "mask_share",
    "temperature",
    "same_texts",
    "packing",
    "too_long",
    "on_error",
)
_KNOWLEDGE = (
    "triples",
    "triples_each",
    "triples_room",
    "entities",
    "passages",
    "passages_kind",
    "passages_each",
    "oracle_share",
    "allowed_weight",
    "lexicon",
    "lexicon_weight",
)
_OPTIMIZER = (
    "name",
    "learning_rate",
    "schedule",
    "warmup_steps",
    "final_fraction",
    "weight_decay",
    "no_decay",
    "b1",
    "b2",
    "eps",
    "clip_norm",
    "lora_plus_ratio",
    "galore_rank",
    "galore_every",
)
_DISTILL = (
    "teachers",
    "cache",
    "divergence",
    "divergence_options",
    "temperature",
    "weight",
    "data_weight",
    "top_k",
    "features",
    "on_policy",
    "alignment",
    "context",
)
# What alters a run's trajectory, by section.
_ALTERS: dict[str, tuple[str, ...]] = {
    "model": _MODEL,
    "prune": _PRUNE,
    "factorize": ("keep", "error", "activations", "targets", "exclude", "calibration_batches"),
    "quantize": _QUANTIZE,
    "": ("method",),
    "data": _DATA,
    "data.train": _SOURCE,
    "data.knowledge": _KNOWLEDGE,
    "optimizer": _OPTIMIZER,
    "train": ("steps", "epochs", "batch_size", "accumulate", "seed", "router_loss"),
    "distill": _DISTILL,
}
# What does not: how it is computed, watched and kept, and what other commands do.
_LEAVES: dict[str, tuple[str, ...]] = {
    "": ("output", "mesh", "sharding", "resume", "resume_with"),
    "model": ("remat", "attention"),
    "prune": ("sensitivity",),
    "data": ("validation", "test"),
    "train": (
        "log_every",
        "eval_every",
        "patience",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_best",
        "nan_limit",
        "loss_chunk",
        "tensorboard",
    ),
    "teach": ("what", "k", "dtype", "shard_rows", "url", "model", "key_variable"),
    "edit": (
        "edits",
        "method",
        "layers",
        "options",
        "search",
        "prefixes",
        "limit",
        "calibration_batches",
    ),
    "inject": ("by", "unseen", "retained"),
    "evaluate": ("metrics", "limit", "max_tokens", "batch_size"),
    "generate": ("prompts", "max_tokens", "temperature", "top_k", "top_p", "stop", "seed", "cache"),
}
# What a checkpoint knows of files, whose fields are those of a section.
_SECTIONS = {
    "base": "model",
    "task": "model",
    "data": "data",
    "teacher": "distill",
    "teachers": "distill",
}


def _dotted(sections: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    return tuple(
        f"{section}.{name}".lstrip(".") for section, names in sections.items() for name in names
    )


ALTERS, LEAVES = _dotted(_ALTERS), _dotted(_LEAVES)


def settings(config: Any) -> dict[str, Any]:
    """Dotted name -> value, as JSON has it, of each field that alters what is trained."""
    tree = json.loads(json.dumps(dataclasses.asdict(config)))

    def of(name: str) -> Any:
        value = tree
        for part in name.split("."):
            value = value[part]
        return value

    return {**{name: of(name) for name in ALTERS}, "method": {"name": "lora", **config.method}}


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
    then: Mapping[str, Any], now: Mapping[str, Any], resume_with: Sequence[str], where: Any
) -> str | None:
    """Why a run cannot go on from a checkpoint of identity `then`, in one sentence; None where it
    can.
    """
    found = changed(then, now, resume_with)
    if not found:
        return None
    end = "use another output or resume=false"
    if "settings" in found:
        return (
            f"the checkpoint in {where} does not say with which settings it was made, as "
            f"an older version wrote it; {end}"
        )
    named = [name for name in found if name in ALTERS] or list(found)
    said = ", ".join(f"{name} ({found[name][0]!r}, now {found[name][1]!r})" for name in named)
    wish = (
        f", or resume_with=[{','.join(named)}] where that is wanted"
        if set(named) <= set(ALTERS)
        else ""
    )
    return f"the checkpoint in {where} was made with another {said}; set it back{wish}, {end}"
