"""What the configuration's `optimizer` and `train` sections hold."""

from __future__ import annotations

from typing import Literal

from peft_jax.core.options import configuration, option


@configuration
class OptimizerConfig:
    name: Literal["adamw", "adamw8bit", "adam", "sgd", "lion", "adafactor", "galore"] = option(
        "adamw", "the optax optimizer; adamw8bit keeps its moments in 8 bits"
    )
    learning_rate: float = option(1e-3, "peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = option("cosine", "decay after warm-up")
    warmup_steps: int = option(20, "steps of linear warm-up")
    final_fraction: float = option(0.0, "the last learning rate as a fraction of the peak")
    weight_decay: float = option(0.0, "decoupled weight decay")
    no_decay: list[str] | None = option(
        None,
        "what weight decay spares, as [norm, magnitude]; by default biases and norms, as "
        "transformers' Trainer",
    )
    b1: float = option(0.9, "first moment's decay (momentum for sgd)")
    b2: float = option(0.999, "second moment's decay")
    eps: float = option(1e-8, "Adam's epsilon")
    clip_norm: float = option(1.0, "clip gradients to this global norm; 0 for no clipping")
    lora_plus_ratio: float = option(1.0, "LoRA+: learning rate of LoRA's B as a multiple of A's")
    galore_rank: int = option(128, "GaLore: rank of the gradients' projection")
    galore_every: int = option(200, "GaLore: steps between new projections")


@configuration
class TrainConfig:
    steps: int | None = option(None, "optimizer steps; by default `epochs` passes over the data")
    epochs: float = option(1.0, "passes over the data where `steps` is not given")
    batch_size: int = option(8, "rows in a step, over all devices and micro-batches")
    accumulate: int = option(1, "micro-batches in a step")
    seed: int = option(0, "of initialisation, order and dropout")
    log_every: int = option(10, "steps between log lines", alters=False)
    eval_every: int = option(0, "steps between evaluations; 0 for at the end only", alters=False)
    patience: int = option(
        0, "stop after this many evaluations without improvement; 0 for never", alters=False
    )
    checkpoint_every: int = option(
        0, "steps between checkpoints; 0 for at the end only", alters=False
    )
    keep_checkpoints: int = option(2, "how many of the newest checkpoints to keep", alters=False)
    keep_best: bool = option(True, "end with the weights of the best evaluation", alters=False)
    nan_limit: int = option(
        10, "stop after this many steps in a row whose gradient is not finite", alters=False
    )
    loss_chunk: int | None = option(
        None,
        "tokens whose logits are computed at once; 0 for all, by default as memory asks",
        alters=False,
    )
    mask_updates: bool | None = option(
        None, "mask adapters over pruned weights too; by default as prune.mask_updates"
    )
    router_loss: float | None = option(
        None, "weight of a mixture's load-balancing loss; by default as its checkpoint says"
    )
    tensorboard: bool = option(True, "also write TensorBoard event files", alters=False)
