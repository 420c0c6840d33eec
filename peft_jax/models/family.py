"""What a family of models is: a record at the end of the file of its modules, `FAMILY =
Family(...)`, or of an installed package (an entry point of the group `peft_jax.families`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from peft_jax.core.roles import Roles
from peft_jax.models.blocks import Task

NOTHING = "$^"  # a pattern that fits no name
Renaming = tuple[tuple[str, str], ...]  # (pattern, replacement) of names, one after the other

ENCODER_TASKS: tuple[Task, ...] = (
    "masked_lm",
    "sequence_classification",
    "token_classification",
    "question_answering",
    "feature_extraction",
)
DECODER_TASKS: tuple[Task, ...] = (
    "causal_lm",
    "sequence_classification",
    "token_classification",
    "feature_extraction",
)


def _none() -> dict[Any, Any]:
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """A family: its class of modules, the configuration out of Hugging Face's, its tasks, how
    checkpoints name things, and an example.

    `name` is Hugging Face's `model_type`, `class_name` the beginning of its classes' names.
    `example` are values of a Hugging Face config of a tiny model, that the tests build and compare
    with PyTorch's.
    """

    name: str
    class_name: str
    module: type[nn.Module]
    config: Callable[[Any], Any]
    tasks: tuple[Task, ...]
    roles: Roles
    example: Mapping[str, Any]
    prefix: str  # the module that holds everything but the head
    embedding: str  # the path of the token embedding
    head: str  # Hugging Face's name of the layer whose weight is the embedding where it is tied
    # Modules of heads, of all tasks: those of other tasks may be in a checkpoint.
    heads: tuple[str, ...]
    absent: str = NOTHING  # pattern of tensors that no checkpoint has
    # Pattern of tensors that some checkpoints have and the model does not need (copies, buffers).
    spare: str = r".*\.position_ids"
    # Hugging Face's modules that look tokens up, where `embedding` is not the one
    look_ups: tuple[str, ...] = ()
    own_head: bool = False  # the head is the embedding unless the checkpoint has one
    # By task, the linear module of Hugging Face's class that may have no kernel here (a head that
    # is the embedding, an unused pooler).
    without_kernel: Mapping[Task, str] = dataclasses.field(default_factory=_none)
    # Ends of names of modules that transformers keeps in float32 and treats apart
    float32: tuple[str, ...] = ()
    conv1d: tuple[str, ...] = ()  # modules whose weights Hugging Face has as [in, out]
    # Of stacked experts' arrays, by name: what checkpoints have of each expert, in this order
    expert_parts: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=_none)
    renamed: Renaming = ()  # from names of modules here to Hugging Face's
    disk: Renaming = ()  # from names of tensors to those in checkpoints
    classes: Mapping[Task, str] = dataclasses.field(default_factory=_none)  # that break the rule
    # For a family that transformers does not know: the `model_type` of one that computes the same,
    # whose class reads the config and whose model is the reference; and how names of its tensors
    # become those of this family's checkpoints.
    like: str = ""
    like_names: Renaming = ()
