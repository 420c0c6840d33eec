"""Prompts of virtual tokens before the input: prompt tuning (Lester et al. 2021, arXiv:2104.08691),
P-tuning (Liu et al. 2021, arXiv:2103.10385), multitask prompt tuning (Wang et al. 2023,
arXiv:2303.02861) and context-aware prompt tuning (Blau et al. 2024, arXiv:2410.17222).

Two attachments do it. `Prompt`, around the model, puts the ids -1, -2, ... before each row, moves
the positions of its tokens, and takes the virtual tokens' outputs away; `VirtualTokens`, at the
embedding, has their embeddings. A packed row has the prompt once: all its sequences see it, and
none sees another. With a key/value cache the first call puts the prompt into it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, Unpack

import jax
import jax.numpy as jnp

from peft_jax.core.attachment import Attachment, attach
from peft_jax.core.method import Method
from peft_jax.core.placing import token_embedding, token_stack
from peft_jax.core.reparametrised import node
from peft_jax.core.tree import places
from peft_jax.core.weight import static, take
from peft_jax.core.where import Embedded, Selection
from peft_jax.models.blocks import ScaledEmbed, embedding_scale, scaled
from peft_jax.models.cache import Hidden, Inputs


@node
class Prompt(Attachment):
    """`length` virtual tokens before each row. `kind` says what the module is: the stack of a
    "decoder" or an "encoder" of this package, or any "model" of tokens [B, T].

    In a bank `gate` [B] is 0 for a row without a prompt: nothing sees its virtual tokens. An
    encoder's rows are one sequence each; the state that stands first is the first virtual token's,
    as PEFT has it.
    """

    gate: jax.Array | None = None
    length: int = static()
    kind: str = static(default="decoder")
    name: str = static(default="default")
    frozen: bool = static(default=False)

    @property
    def slots(self) -> int:  # type: ignore[override]
        return self.length

    def moves(self, path: str) -> int:
        return self.length

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.kind == "decoder":
            return self._decoder(call, *args, **kwargs)
        if self.gate is not None:
            raise ValueError(
                "a bank of prompts needs a decoder of this package, which can hide a row's "
                "virtual tokens"
            )
        if self.kind == "encoder":
            return self._encoder(call, *args, **kwargs)
        out = call(self._before(args[0], -1 - jnp.arange(self.length)), *args[1:], **kwargs)
        return (
            (out[0][:, self.length :], *out[1:])
            if isinstance(out, tuple)
            else out[:, self.length :]
        )

    def _encoder(self, call: Callable[..., Any], inputs: Inputs) -> Hidden:
        P, tokens, positions = self.length, inputs.tokens, inputs.positions

        def whole(x, values):
            return None if x is None else self._before(jnp.broadcast_to(x, tokens.shape), values)

        out = call(
            inputs.replace(
                tokens=self._before(tokens, -1 - jnp.arange(P)),
                segment_ids=whole(inputs.segment_ids, 1),
                token_type_ids=whole(inputs.token_type_ids, 0),
                positions=None if positions is None else whole(positions + P, jnp.arange(P)),
            )
        )
        return out._replace(states=out.states[:, P:])

    def _before(self, x: jax.Array, values: Any) -> jax.Array:
        """x [B, T] with `values` before each row."""
        values = jnp.broadcast_to(jnp.asarray(values).astype(x.dtype), (x.shape[0], self.length))
        return jnp.concatenate([values, x], axis=1)

    def _decoder(self, call: Callable[..., Any], inputs: Inputs) -> Any:
        P, tokens, segment_ids = self.length, inputs.tokens, inputs.segment_ids
        cache = inputs.cache
        positions = None if inputs.positions is None else inputs.positions + P
        if cache is not None and not cache.empty:  # it begins with the prompt
            return call(inputs.replace(positions=positions))
        if cache is not None and cache.length < P + tokens.shape[1]:
            raise ValueError(
                f"the cache has {cache.length} slots, and {tokens.shape[1]} tokens after a prompt "
                f"of {P} need {P + tokens.shape[1]}"
            )
        if segment_ids is None and (cache is not None or self.gate is not None):
            segment_ids = jnp.ones(tokens.shape, jnp.int32)
        if positions is not None:
            positions = self._before(jnp.broadcast_to(positions, tokens.shape), jnp.arange(P))
        seen = -1 if self.gate is None else jnp.where(self.gate > 0, -1, 0)[:, None]
        segment_ids = None if segment_ids is None else self._before(segment_ids, seen)
        x, new = call(
            inputs.replace(
                tokens=self._before(tokens, -1 - jnp.arange(P)),
                positions=positions,
                segment_ids=segment_ids,
                common=True,
            )
        )
        return x[:, P:], new


@node
class EncoderPrompt(Prompt):
    """Virtual tokens before what the encoder of an encoder-decoder gets; its states stay, for the
    decoder to attend to.
    """

    method: ClassVar[str] = "encode"

    @property
    def slots(self) -> int:  # type: ignore[override]
        return 0

    def moves(self, path: str) -> int:
        return self.length if path.startswith("encoder/") else 0

    def around(
        self, call: Callable[..., Any], tokens: jax.Array, segment_ids: jax.Array | None = None
    ) -> Any:  # type: ignore[override]
        segment_ids = (
            None
            if segment_ids is None
            else self._before(jnp.broadcast_to(segment_ids, tokens.shape), 1)
        )
        return call(self._before(tokens, -1 - jnp.arange(self.length)), segment_ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Virtual(Attachment):
    """At the embedding: the ids -1, -2, ... stand for the rows of `prompt()`. (What hides a row's
    prompt is `Prompt.gate`.)

    They take the place of what the embedding puts out, after a scale of its own, as in PEFT.
    `scale` is the one that they start with, where they start from the embedding's rows.
    """

    gate: jax.Array | None = None
    scale: float | None = static(default=None)
    name: str = static(default="default")
    frozen: bool = static(default=False)

    @property
    def lead(self) -> tuple[int, ...]:
        """An embedding has no leading axes."""
        return ()

    def plain(self) -> Self:
        return self.replace(scale=None)

    def check(self, module: Any) -> None:
        scale = module.scale if isinstance(module, ScaledEmbed) else 1.0
        if self.scale not in (None, scale):
            raise ValueError(
                f"the prompt {self.name!r} starts from rows of the embedding times {self.scale:g}, "
                "and this model multiplies "
                f"them by {scale:g}; give the method model=model"
            )

    def prompt(self) -> jax.Array:
        """Embeddings of the virtual tokens, [P, D], or [B, P, D] where rows have prompts of their
        own.
        """
        raise NotImplementedError

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ids = args[0]
        y = call(jnp.maximum(ids, 0), *args[1:], **kwargs)
        prompt = self.prompt().astype(y.dtype)
        at = jnp.clip(-1 - ids, 0, prompt.shape[-2] - 1)
        virtual = (
            prompt[at] if prompt.ndim == 2 else jnp.take_along_axis(prompt, at[..., None], axis=1)
        )
        return jnp.where((ids < 0)[..., None], virtual, y)


@node
class VirtualTokens(Virtual):
    """Prompt tuning: `embeddings` [P, D] train as they are."""

    trainable: ClassVar[tuple[str, ...]] = ("embeddings",)
    embeddings: jax.Array

    def prompt(self) -> jax.Array:
        return self.embeddings


@node
class EncodedTokens(Virtual):
    """P-tuning: `embeddings` [P, D] through an encoder, an MLP of `layers` (weight, bias) with ReLU
    between them, after the bidirectional LSTM `lstm` where there is one: for each layer two
    directions of (input [n, 4h], recurrent [h, 4h], bias [4h]), gates in the order input, forget,
    cell, output.
    """

    trainable: ClassVar[tuple[str, ...]] = ("embeddings", "layers", "lstm")
    biases: ClassVar[tuple[str, ...]] = (r"layers/\d+/1", r"lstm/\d+/\d+/2")
    embeddings: jax.Array
    layers: tuple[tuple[jax.Array, jax.Array], ...]
    lstm: tuple[tuple[tuple[jax.Array, jax.Array, jax.Array], ...], ...] = ()

    def prompt(self) -> jax.Array:
        x = self.embeddings
        for forward, backward in self.lstm:
            x = jnp.concatenate([_lstm(x, *forward), _lstm(x[::-1], *backward)[::-1]], axis=-1)
        for i, (w, b) in enumerate(self.layers):
            x = (jax.nn.relu(x) if i else x) @ w + b
        return x


def _lstm(x: jax.Array, w: jax.Array, u: jax.Array, b: jax.Array) -> jax.Array:
    """Hidden states [T, h] of an LSTM over x [T, n] (Hochreiter and Schmidhuber 1997)."""

    def step(state: tuple[jax.Array, jax.Array], given: jax.Array) -> Any:
        h, c = state
        i, f, g, o = jnp.split(given + h @ u, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros(u.shape[0], x.dtype)
    return jax.lax.scan(step, (zero, zero), x @ w + b)[1]


@node
class TaskTokens(Virtual):
    """Multitask prompt tuning: `embeddings` [P, D] times a task's own low-rank matrix, `columns`
    [n, P, r] by `rows` [n, r, D].

    `ids` [B], each row's task, is filled by `bind` from `adapter_ids`.
    """

    trainable: ClassVar[tuple[str, ...]] = ("embeddings", "columns", "rows")
    routed: ClassVar[bool] = True
    embeddings: jax.Array
    columns: jax.Array
    rows: jax.Array
    ids: jax.Array | None = None

    def prompt(self) -> jax.Array:
        if self.ids is None and self.columns.shape[0] > 1:
            raise ValueError(
                "a prompt for several tasks needs apply(params, tokens, adapter_ids=tasks), one "
                "for each row"
            )
        ids = jnp.zeros((1,), jnp.int32) if self.ids is None else self.ids
        prompt = self.embeddings * jnp.matmul(self.columns[ids], self.rows[ids])
        return prompt[0] if self.ids is None else prompt


@node
class ContextTokens(Virtual):
    """Context-aware prompt tuning: the embeddings of a context [P, D] and what is added to them,
    `delta` [P, D].

    A token's delta is cut back to the norm `radius` [P] (zero where it is not to change).
    """

    trainable: ClassVar[tuple[str, ...]] = ("delta",)
    embeddings: jax.Array
    delta: jax.Array
    radius: jax.Array
    token_ids: tuple[int, ...] = static(default=())
    token_types: tuple[int, ...] = static(default=())
    epsilon: float = static(default=0.1)
    format_epsilon: float = static(default=0.1)

    def prompt(self) -> jax.Array:
        delta = jnp.where(self.radius[:, None] > 0, self.delta, jax.lax.stop_gradient(self.delta))
        norm = jnp.linalg.norm(jax.lax.stop_gradient(delta), axis=-1)
        return (
            self.embeddings
            + delta * (self.radius / jnp.maximum(norm, jnp.maximum(self.radius, 1e-30)))[:, None]
        )


def place_prompt(params: Any, tokens: Virtual, length: int, embedding: str | None) -> Any:
    """`params` with a prompt of `length` tokens. Raises ValueError where there is one already."""
    if old := [p for p, w in places(params).items() if isinstance(w, Prompt)]:
        raise ValueError(
            f"the tree has a prompt already, {old[0]}; a bank holds several (peft_jax.core.bank)"
        )
    path, _ = token_embedding(params, embedding)
    kind, stack = token_stack(params, embedding)
    make: Any = EncoderPrompt if kind == "encoder-decoder" else Prompt
    prompt = make(length=length, kind=kind, name=tokens.name)
    return attach(
        params, {path: {f"tokens_{tokens.name}": tokens}, stack: {f"prompt_{tokens.name}": prompt}}
    )


def _length(num_virtual_tokens: int) -> int:
    if num_virtual_tokens < 1:
        raise ValueError(f"num_virtual_tokens must be at least 1, got {num_virtual_tokens}")
    return num_virtual_tokens


def _rows_of(weight: Any, ids: jax.Array, scale: float) -> jax.Array:
    """What the embedding `weight` puts out for `ids`, in float32."""
    return scaled(take(weight, ids), scale).astype(jnp.float32)


def prompt_tuning(
    params: Any,
    key: jax.Array,
    *,
    num_virtual_tokens: Annotated[int, "length of the prompt"] = 20,
    init: Annotated[
        Literal["random", "vocabulary", "text"], "random, vocabulary or text"
    ] = "random",
    token_ids: Annotated[Sequence[int], "of text, its tokens"] = (),
    model: Annotated[Any, "the model, where it scales its embeddings"] = None,
    **where: Unpack[Embedded],
) -> Any:
    """`params` with a prompt of virtual tokens.

    init: random draws N(0, 1) scaled to the embedding's deviation, vocabulary takes the embeddings
    of tokens drawn at random, text those of `token_ids` (a text's), repeated or cut to the length.
    `embedding` names the tokens' embedding where there are several. A `model` that scales its
    embeddings (Gemma) has to be given. Raises ValueError for an unknown init, token ids outside the
    vocabulary, and a tree that has a prompt already.
    """
    at = Selection.of(prompt_tuning, where)
    scale = embedding_scale(model)
    P, weight = _length(num_virtual_tokens), token_embedding(params, at.embedding)[1]
    V, D = weight.shape
    if init == "random":
        sample = _rows_of(weight, jax.random.randint(key, (min(V, 256),), 0, V), scale)
        start = jax.random.normal(jax.random.fold_in(key, 1), (P, D)) * sample.std()
    elif init == "vocabulary":
        start = _rows_of(weight, jax.random.randint(key, (P,), 0, V), scale)
    elif init == "text":
        ids = _checked_ids(list(token_ids), V, "token_ids")
        start = _rows_of(weight, ids[jnp.arange(P) % len(ids)], scale)
    else:
        raise ValueError(f"unknown init {init!r}; there are random, vocabulary and text")
    return place_prompt(
        params, VirtualTokens(embeddings=start, scale=scale, name=at.adapter), P, at.embedding
    )


def _checked_ids(ids: list[int], vocabulary: int, option: str) -> jax.Array:
    if not ids or min(ids) < 0 or max(ids) >= vocabulary:
        raise ValueError(f"{option} must be ids below {vocabulary}, one at least; got {ids[:8]}")
    return jnp.asarray(ids, jnp.int32)


def p_tuning(
    params: Any,
    key: jax.Array,
    *,
    num_virtual_tokens: Annotated[int, "length of the prompt"] = 20,
    encoder: Annotated[Literal["mlp", "lstm"], "mlp or lstm"] = "mlp",
    hidden_size: Annotated[
        int | None, "units of the encoder; by default the embedding's features"
    ] = None,
    num_layers: Annotated[int, "layers of the LSTM"] = 2,
    **where: Unpack[Embedded],
) -> Any:
    """`params` with a prompt that an encoder makes: an MLP of three layers, or an LSTM of
    `num_layers` and an MLP of two.

    `hidden_size` defaults to the embedding's features. Exported as the prompt alone, without its
    encoder, as PEFT does. Raises ValueError for an unknown encoder and a tree that has a prompt
    already.
    """
    at = Selection.of(p_tuning, where)
    P, D = _length(num_virtual_tokens), token_embedding(params, at.embedding)[1].shape[-1]
    h = hidden_size or D
    keys = iter(jax.random.split(key, 4 + 8 * num_layers))

    def uniform(n: int, *shape: int) -> jax.Array:
        return jax.random.uniform(next(keys), shape, jnp.float32, -(n**-0.5), n**-0.5)

    if encoder == "mlp":
        sizes, lstm = (D, h, h, D), ()
    elif encoder == "lstm":
        sizes = (2 * h, 2 * h, D)
        lstm = tuple(
            tuple((uniform(h, n, 4 * h), uniform(h, h, 4 * h), uniform(h, 4 * h)) for _ in range(2))
            for n in (D, *[2 * h] * (num_layers - 1))
        )
    else:
        raise ValueError(f"unknown encoder {encoder!r}; there are mlp and lstm")
    layers = tuple((uniform(a, a, b), jnp.zeros(b)) for a, b in itertools.pairwise(sizes))
    start = jax.random.normal(next(keys), (P, D))
    return place_prompt(
        params,
        EncodedTokens(embeddings=start, layers=layers, lstm=lstm, name=at.adapter),
        P,
        at.embedding,
    )


def multitask_prompt_tuning(
    params: Any,
    key: jax.Array,
    *,
    num_virtual_tokens: Annotated[int, "length of the prompt"] = 20,
    num_tasks: Annotated[int, "tasks that share the prompt"] = 1,
    num_ranks: Annotated[int, "rank of a task's own matrix"] = 1,
    **where: Unpack[Embedded],
) -> Any:
    """`params` with a prompt that tasks share, each changing it by a matrix of rank `num_ranks`;
    rows say theirs by `adapter_ids`.

    Raises ValueError for a count below 1 and a tree that has a prompt already.
    """
    at = Selection.of(multitask_prompt_tuning, where)
    if num_tasks < 1 or num_ranks < 1:
        raise ValueError(
            f"num_tasks and num_ranks must be at least 1, got {num_tasks} and {num_ranks}"
        )
    P, D = _length(num_virtual_tokens), token_embedding(params, at.embedding)[1].shape[-1]
    keys = jax.random.split(key, 3)
    tokens = TaskTokens(
        embeddings=jax.random.normal(keys[0], (P, D)),
        columns=0.02 * jax.random.normal(keys[1], (num_tasks, P, num_ranks)),
        rows=0.02 * jax.random.normal(keys[2], (num_tasks, num_ranks, D)),
        name=at.adapter,
    )
    return place_prompt(params, tokens, P, at.embedding)


def cpt(
    params: Any,
    key: jax.Array,
    *,
    token_ids: Annotated[Sequence[int], "tokens of the context"],
    token_types: Annotated[
        Sequence[int], "of each, modulo 4: 1 and 3 template, 2 input, 0 answer; by default inputs"
    ] = (),
    epsilon: Annotated[float, "how far a token may move"] = 0.1,
    format_epsilon: Annotated[float, "how far a template may move"] = 0.1,
    model: Annotated[Any, "the model, where it scales its embeddings"] = None,
    **where: Unpack[Embedded],
) -> Any:
    """`params` with a prompt that starts as the context `token_ids` (examples, say), whose
    embeddings may move a little.

    `token_types` (as PEFT's cpt_tokens_type_mask: modulo 4, 1 and 3 are templates, 2 an input, 0 an
    answer, which stays) default to inputs. A token moves by at most `epsilon`, a template's by
    `format_epsilon`, times sqrt(D / 2048). Training differs from PEFT's in one thing: the loss is
    the data's alone, without the context's own answers. `key` is not used. A `model` that scales
    its embeddings (Gemma) has to be given. Raises ValueError for ids outside the vocabulary, types
    of another length, and a tree that has a prompt already.
    """
    at = Selection.of(cpt, where)
    weight = token_embedding(params, at.embedding)[1]
    V, D = weight.shape
    ids = _checked_ids(list(token_ids), V, "token_ids")
    types = list(token_types) or [2] * len(ids)
    if len(types) != len(ids):
        raise ValueError(f"there are {len(types)} token_types for {len(ids)} token_ids")
    scale = embedding_scale(model)
    context = context_tokens(
        _rows_of(weight, ids, scale), token_ids, types, epsilon, format_epsilon, at.adapter
    )
    return place_prompt(params, context.replace(scale=scale), len(types), at.embedding)


def context_tokens(
    rows: jax.Array,
    ids: Sequence[int],
    types: Sequence[int],
    epsilon: float,
    format_epsilon: float,
    name: str,
) -> ContextTokens:
    """A context that has not moved yet, from its embeddings [P, D]."""
    size = {1: format_epsilon, 2: epsilon, 3: format_epsilon}
    radius = jnp.asarray([size.get(t % 4, 0.0) if t > 0 else 0.0 for t in types], jnp.float32)
    return ContextTokens(
        embeddings=rows,
        delta=jnp.zeros_like(rows),
        radius=radius * (rows.shape[1] / 2048) ** 0.5,
        name=name,
        token_ids=tuple(ids),
        token_types=tuple(types),
        epsilon=epsilon,
        format_epsilon=format_epsilon,
    )


METHOD = (
    Method(
        name="prompt_tuning",
        function=prompt_tuning,
        nodes=(Prompt, VirtualTokens),
        at="input",
        title="prompt tuning",
        follows="Lester et al. 2021, arXiv:2104.08691; PEFT `PromptTuningConfig`",
        differs=(
            "Random prompts have the embedding's deviation; PEFT draws N(0, 1), which is much "
            "larger than most models' embeddings. A packed row has the prompt once"
        ),
        reference="PEFT",
        identity=False,
        takes_model=True,
        example={"num_virtual_tokens": 3},
    ),
    Method(
        name="p_tuning",
        function=p_tuning,
        nodes=(Prompt, EncodedTokens),
        at="input",
        title="P-tuning (MLP, LSTM)",
        follows="Liu et al. 2021, arXiv:2103.10385; PEFT `PromptEncoderConfig`",
        differs="Biases of the encoder start at zero; exported without the encoder, as PEFT does",
        reference="PEFT",
        identity=False,
        example={"num_virtual_tokens": 3, "encoder": "lstm", "hidden_size": 4},
    ),
    Method(
        name="multitask_prompt_tuning",
        function=multitask_prompt_tuning,
        nodes=(Prompt, TaskTokens),
        at="input",
        title="multitask prompt tuning",
        follows="Wang et al. 2023, arXiv:2303.02861; PEFT `MultitaskPromptTuningConfig`",
        differs="Rows say their task by `adapter_ids`; source and target stages are two trainings",
        reference="PEFT",
        identity=False,
        example={"num_virtual_tokens": 3},
    ),
    Method(
        name="cpt",
        function=cpt,
        nodes=(Prompt, ContextTokens),
        at="input",
        title="context-aware prompt tuning",
        follows="Blau et al. 2024, arXiv:2410.17222; PEFT `CPTConfig`",
        differs="The loss is the data's alone, without the context's own answers",
        reference="PEFT",
        identity=False,
        takes_model=True,
        example={"token_ids": [3, 4, 5], "epsilon": 50.0},
    ),
)
