"""Knowledge injection: facts put into a model's weights, and what they do there."""

from peft_jax.knowledge.editing import edit
from peft_jax.knowledge.evaluation import edit_scores
from peft_jax.knowledge.requests import Edit, read_edits
from peft_jax.knowledge.tracing import trace

__all__ = [
    "Edit",
    "edit",
    "edit_scores",
    "read_edits",
    "trace",
]
