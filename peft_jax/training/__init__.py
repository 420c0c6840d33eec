"""Training: step, loop, optimizer, evaluation."""

from peft_jax.training.evaluate import perplexity
from peft_jax.training.loop import initial_state, train
from peft_jax.training.optimizer import make_optimizer
from peft_jax.training.step import init_state, make_evaluation, make_step

__all__ = [
    "init_state",
    "initial_state",
    "make_evaluation",
    "make_optimizer",
    "make_step",
    "perplexity",
    "train",
]
