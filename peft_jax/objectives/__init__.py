"""What is minimised: objectives, and how a batch is read for them."""

from peft_jax.objectives.contrast import contrast, embed_texts
from peft_jax.objectives.labels import ANSWERS, LABELS, squared_error
from peft_jax.objectives.objective import OBJECTIVES, make_objective
from peft_jax.objectives.reading import Apply, Objective, Reading, cross_entropy, over_positions
from peft_jax.objectives.tokens import TOKENS, balanced, masked_reading, next_token

__all__ = [
    "ANSWERS",
    "LABELS",
    "OBJECTIVES",
    "TOKENS",
    "Apply",
    "Objective",
    "Reading",
    "balanced",
    "contrast",
    "cross_entropy",
    "embed_texts",
    "make_objective",
    "masked_reading",
    "next_token",
    "over_positions",
    "squared_error",
]
