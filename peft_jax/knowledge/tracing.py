"""Causal tracing: which states a fact depends on (Meng et al. 2022, arXiv:2202.05262, section
2).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.attachment import attach
from peft_jax.core.bind import Bound, bound_of
from peft_jax.core.placing import token_embedding
from peft_jax.core.sharding import fetch
from peft_jax.core.weight import materialize
from peft_jax.data.spans import tokens_of, with_offsets
from peft_jax.knowledge.hooks import KEY, Noise, Restore, feed_forward
from peft_jax.knowledge.requests import Edit, edit_rows, joined
from peft_jax.models.blocks import embedding_scale


class Trace(NamedTuple):
    """Probabilities of the answer's first token: `clean`, with the subject `corrupted`, and
    `restored` [T, L], corrupted but for one token's state after one layer. `tokens` are the
    prompt's, `subject` the first and the last of the subject's.
    """

    clean: float
    corrupted: float
    restored: np.ndarray
    tokens: list[str]
    subject: tuple[int, int]


def trace(
    model: Any,
    params: Any,
    tokenizer: Any,
    fact: Edit,
    *,
    what: Literal["states", "feed_forward", "attention"] = "states",
    window: int = 1,
    noise: float = 3.0,
    samples: int = 10,
    seed: int = 0,
) -> Trace:
    """How much of a fact comes back when single states do, the subject's embeddings being blurred
    by `noise` times the standard deviation of all embeddings, averaged over `samples` draws.

    `what` is restored: hidden states after layers, or what feed-forwards or attentions put out, in
    a `window` of layers around each one. Raises ValueError for models without stacked layers.
    """
    place = feed_forward(params)
    module = {
        "states": place.stack,
        "feed_forward": place.module,
        "attention": place.attention,
    }[what]
    rows = edit_rows(tokenizer, [fact.question], [fact.target], [fact.place])
    n = int(rows.segment_ids.sum()) - int(rows.weights.sum())  # the prompt's tokens
    tokens = rows.tokens[:, :n]
    target = int(rows.targets[0, n - 1])
    offsets = with_offsets(tokenizer, joined(fact.question, fact.target))["offset_mapping"]
    first, end = tokens_of(fact.question, offsets, fact.place)
    embedding, weight = token_embedding(params)
    table = fetch(materialize(weight)).astype(np.float32)
    drawn = (
        noise
        * table.std()
        * embedding_scale(model)
        * jax.random.normal(jax.random.key(seed), (samples, n, table.shape[1]))
    )
    inside = (jnp.arange(n) >= first) & (jnp.arange(n) < end)
    blur = jnp.concatenate([jnp.zeros((1, *drawn.shape[1:])), drawn * inside[:, None]])
    blurred = attach(params, {embedding: {KEY: Noise(noise=blur)}})
    apply = bound_of(model)
    run = functools.partial(apply.program(_probabilities, static_argnames="module"), apply)
    batch, layers = (
        jnp.broadcast_to(jnp.asarray(tokens), (samples + 1, n)),
        place.layers,
    )
    nothing = np.zeros((layers, n), bool)
    clean, corrupted = fetch(run(blurred, batch, target, nothing, module=module))
    restored = np.zeros((n, layers), np.float32)
    for t in range(n):
        for layer in range(layers):
            mask = nothing.copy()
            mask[max(0, layer - window // 2) : layer - window // 2 + window, t] = True
            restored[t, layer] = run(blurred, batch, target, mask, module=module)[1]
    words = [tokenizer.decode([i]) for i in tokens[0].tolist()]
    return Trace(float(clean), float(corrupted), restored, words, (first, end - 1))


def _probabilities(
    apply: Bound, params: Any, batch: jax.Array, target: Any, mask: Any, *, module: str
) -> jax.Array:
    """The target's probability after the clean row, and its mean after the corrupted ones."""
    logits = apply(attach(params, {module: {KEY: Restore(mask=mask)}}), batch)[:, -1]
    p = jax.nn.softmax(logits.astype(jnp.float32))[:, target]
    return jnp.stack([p[0], p[1:].mean()])


def plot_trace(traces: Trace | Sequence[Trace], path: Path) -> Path:
    """A heat map by token and layer of what comes back of each fact, in a file."""
    from matplotlib.figure import Figure  # takes long to load

    traces = [traces] if isinstance(traces, Trace) else list(traces)
    figure = Figure(
        figsize=(6, 0.3 * sum(len(t.tokens) for t in traces) + 1.2 * len(traces)),
        layout="constrained",
    )
    for axis, found in zip(np.atleast_1d(figure.subplots(len(traces), 1)), traces, strict=True):
        image = axis.imshow(
            found.restored,
            aspect="auto",
            cmap="Purples",
            vmin=found.corrupted,
            vmax=max(found.clean, 1e-6),
        )
        names = [
            f"{w}*" if found.subject[0] <= i <= found.subject[1] else w
            for i, w in enumerate(found.tokens)
        ]
        axis.set_yticks(range(len(names)), names, fontsize="small")
        axis.set(xlabel="layer", title=f"clean {found.clean:.2f}, corrupted {found.corrupted:.2f}")
        figure.colorbar(image, ax=axis, label="p(answer)")
    figure.savefig(path, dpi=120)
    return path
