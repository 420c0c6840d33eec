"""`python -m peft_jax` is `peft-jax`."""

from peft_jax.cli import run

run()
