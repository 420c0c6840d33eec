"""What the encoders share: configuration, the stack of layers, and the heads' tasks.

A family is a subclass of `Encoder` in a file of its own; its modules and parameters are called as
in Hugging Face's checkpoints. Dropout is on where the call has an rng called "dropout", as `bind`
gives it; attention weights have none. Letters: B batch, T tokens, D model, H heads, d head size, F
feed-forward, V vocabulary, C classes, L layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from peft_jax.models.attention import Mask, make_mask
from peft_jax.models.blocks import Architecture, Layers, Task
from peft_jax.models.cache import Hidden, Inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(Architecture):
    """What an encoder needs to know, hashable, so that a module may hold it."""

    intermediate_size: int
    num_heads: int
    max_position: int = 512
    type_vocab_size: int = 2
    position_offset: int = 0  # RoBERTa counts positions from its padding token's id
    norm_eps: float = 1e-12
    activation: str = "gelu"
    dropout: float = 0.1
    classifier_dropout: float = 0.1

    @property
    def learned_positions(self) -> int | None:
        return self.max_position - self.position_offset

    @property
    def head_dim(self) -> int:
        """Features of an attention head."""
        return self.hidden_size // self.num_heads


def encoder_mask(
    tokens: jax.Array,
    segment_ids: jax.Array | None,
    positions: jax.Array,
    window: int | None = None,
) -> Mask:
    """Every token of a segment sees every other one; with a `window` local layers see those nearer
    than it.
    """
    segment_ids = mask_segments(tokens, segment_ids)
    return make_mask(
        positions, positions, segment_ids, segment_ids, window=window, aligned=True, causal=False
    )


def encoder_shared(
    tokens: jax.Array,
    segment_ids: jax.Array | None,
    positions: jax.Array,
    window: int | None = None,
) -> dict[str, Any]:
    """What the layers of an encoder share: the mask, and what attachments count tokens by."""
    mask = encoder_mask(tokens, segment_ids, positions, window)
    return {"mask": mask, "positions": positions, "segment_ids": mask_segments(tokens, segment_ids)}


def mask_segments(tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array | None:
    """Segments [B, T] of each token; None where all are of one."""
    return None if segment_ids is None else jnp.broadcast_to(segment_ids, tokens.shape)


class Encoder(Layers, nn.Module):
    """An encoder with the head of its `task`; the other fields as of `Decoder`.

    `heads` names the modules that a checkpoint of another task lacks: they start anew, and train
    beside an adapter.
    """

    config: Any
    task: Task = "masked_lm"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = True
    remat: str = "none"
    attention_implementation: str | None = None

    prefix: ClassVar[str] = ""  # the module that holds everything but the head
    heads: ClassVar[tuple[str, ...]] = ("classifier", "qa_outputs", "pooler")
    typed: ClassVar[bool] = True  # the call takes `token_type_ids`

    @property
    def stack_fields(self) -> tuple[Any, ...]:
        """What the stack is made from."""
        return (
            self.config,
            self.dtype,
            self.param_dtype,
            self.scan_layers,
            self.remat,
            self.attention_implementation,
            self.task,
        )

    @nn.nowrap
    def label_head(self) -> None:
        """The last layer of tasks with labels, in `setup`."""
        if self.task in ("sequence_classification", "token_classification"):
            self.classifier = self.dense(self.config.num_labels)
        elif self.task == "question_answering":
            self.qa_outputs = self.dense(2)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """What the task asks for of integer tokens [B, T], in float32: logits [B, T, V] of a masked
        language model, [B, C] of a sequence, [B, T, C] of tokens, [B, T, 2] of an answer's start
        and end; or hidden states [B, T, D].

        `segment_ids` [B, T] keep sequences apart, 0 being padding (an attention mask of ones and
        zeros will do); `token_type_ids` [B, T] tell the first text from the second; `positions` [B,
        T] default to 0, 1, 2, ...
        """
        hidden = self._stack(Inputs(tokens, positions, segment_ids, token_type_ids))
        if self.task == "masked_lm":
            return self.unembed(hidden.states)
        if self.task == "feature_extraction":
            return hidden.states.astype(jnp.float32)
        labels = self.label_logits(hidden, segment_ids)
        return labels.astype(jnp.float32)

    def hidden(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [B, T, D]; `unembed` turns those of a masked language model into logits."""
        return self._stack(Inputs(tokens, positions, segment_ids, token_type_ids)).states

    @nn.nowrap
    def _stack(self, inputs: Inputs) -> Hidden:
        return getattr(self, self.prefix)(inputs)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] in float32 from hidden states [..., D]."""
        raise NotImplementedError

    def label_logits(self, hidden: Hidden, segment_ids: jax.Array | None) -> jax.Array:
        """Logits of the labels."""
        raise NotImplementedError
