"""Knowledge distillation: what a student learns from a teacher's predictions, hidden states and
texts.
"""

from peft_jax.distillation.divergence import make_divergence
from peft_jax.distillation.objective import (
    FeatureTerm,
    OnPolicy,
    Teacher,
    beside_teachers,
    distillation,
    of_student,
)

__all__ = [
    "FeatureTerm",
    "OnPolicy",
    "Teacher",
    "beside_teachers",
    "distillation",
    "make_divergence",
    "of_student",
]
