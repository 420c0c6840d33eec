"""Knowledge at the input: triples beside the mentions of their subjects (K-BERT, Liu et al. 2020,
arXiv:1909.07606), and vectors of entities added there (in the manner of ERNIE, Zhang et al. 2019,
arXiv:1905.07129, and KnowBERT).

The rows of any task get more fields, and the model attachments that read them; the models
themselves know of neither.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.attachment import Attachment, attach
from peft_jax.core.bind import Bound, bound_of
from peft_jax.core.placing import attention_cores, layers_of, token_embedding
from peft_jax.core.reparametrised import node
from peft_jax.core.tree import map_places
from peft_jax.core.weight import static
from peft_jax.data import Record, with_fields
from peft_jax.data.spans import (
    BREAK,
    UNKNOWN,
    Names,
    find_names,
    make_names,
    text_of,
    token_bytes,
    tokens_of,
)
from peft_jax.knowledge.hooks import KEY
from peft_jax.models.cache import Cache
from peft_jax.models.operands import AttentionOperands

logger = logging.getLogger("peft_jax")


class Lexicon(NamedTuple):
    """Names, numbered, as a tokenizer writes them, and what each of its tokens adds to a text."""

    names: Names
    pieces: list[bytes]


def make_lexicon(tokenizer: Any, names: Iterable[str | Sequence[str]]) -> Lexicon:
    """Of names, or lists of a thing's names (aliases), numbered in their order.

    Warns of names that the tokenizer cannot say, which are never found. Raises ValueError for a
    tokenizer without offsets.
    """
    pieces, said, unsaid = token_bytes(tokenizer), [], []
    for number, aliases in enumerate(names):
        for name in [aliases] if isinstance(aliases, str) else aliases:
            ids = tokenizer(name, add_special_tokens=False, verbose=False)["input_ids"]
            text = text_of(pieces, ids, [1] * len(ids))[0].removeprefix(BREAK)
            (unsaid if {BREAK, UNKNOWN} & set(text) else said).append((text, name, number))
    if unsaid:
        logger.warning(
            "%d names hold what the tokenizer cannot say and are never found: %r ...",
            len(unsaid),
            unsaid[0][1],
        )
    return Lexicon(make_names((text, number) for text, _, number in said), pieces)


def find_mentions(
    lexicon: Lexicon, tokens: Any, segments: Any = None
) -> list[tuple[int, int, int]]:
    """(first token, end, number of the name) of each mention in tokens [T], from the left, the
    longest name at a place; whole words of one of the `segments` [T] only (0: of none). Of two
    mentions in one token the first is told.
    """
    ids = np.asarray(tokens).tolist()
    text, spans = text_of(
        lexicon.pieces, ids, [1] * len(ids) if segments is None else np.asarray(segments).tolist()
    )
    found, done = [], 0
    for *span, name in find_names(lexicon.names, text):
        start, end = tokens_of(text, spans, (span[0], span[1]))
        if start >= done:
            found.append((start, end, name))
            done = end
    return found


class Triples(NamedTuple):
    """What is known: `lexicon` of the subjects, and for each of them what is said beside it, as
    tokens.
    """

    lexicon: Lexicon
    said: list[list[np.ndarray]]


def make_triples(tokenizer: Any, facts: Sequence[Record]) -> Triples:
    """Of triples; beside its subject each says " relation object"."""
    of: dict[str, list[str]] = {}
    for fact in facts:
        value = fact.value
        of.setdefault(value["subject"], []).append(f" {value['relation']} {value['object']}")

    def encode(text):
        return np.asarray(
            tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32
        )

    return Triples(
        make_lexicon(tokenizer, of), [[encode(t) for t in texts] for texts in of.values()]
    )


def attach_triples(rows: Any, triples: Triples, *, most: int = 4, room: int = 32) -> Any:
    """Rows (a NamedTuple of arrays [N, ...], those of tokens [N, T]) with at most `most` triples
    beside each mention, as long as `room` more tokens hold them: [N, T + room].

    A triple stands before its mention's last token, so that in a decoder this token sees it and no
    earlier one does. Its soft positions go on from the mention's (figure 2 of the paper), it has no
    loss, and two more fields say what the visible matrix needs: `branches`, 0 for the sentence and
    else the number of the triple, and `mentions`, the number of the mention that a token is of, 0
    for none. Raises ValueError for rows of an encoder-decoder and of questions, whose labels are
    places.
    """
    fields, (N, T) = rows._asdict(), rows.tokens.shape
    labels = fields.get("labels", rows.tokens)
    if "decoder_tokens" in fields or "other_tokens" in fields or labels.shape[1:] not in ((), (T,)):
        raise ValueError(
            "triples are attached to rows of one text each, with labels of the text or of "
            "its tokens"
        )
    fields.setdefault("positions", np.broadcast_to(np.arange(T, dtype=np.int32), (N, T)))
    wide = {n: np.zeros((N, T + room), x.dtype) for n, x in fields.items() if x.shape == (N, T)}
    wide |= {n: np.zeros((N, T + room), np.int32) for n in ("branches", "mentions")}
    for i in range(N):
        w = _woven(triples, rows.tokens[i], rows.segment_ids[i], most, room)
        n, beside = len(w.order), w.soft > 0
        for name in fields.keys() & wide:
            wide[name][i, :n] = fields[name][i][w.order]
        for name in {"targets", "weights", "labels", "rules"} & wide.keys():
            wide[name][i, :n][beside] = 0
        wide["tokens"][i, :n][beside] = w.said
        wide["positions"][i, :n] += w.soft
        wide["branches"][i, :n], wide["mentions"][i, :n] = w.branches, w.mentions
    return with_fields(rows, **wide)


class _Woven(NamedTuple):
    """A row with triples: for each new place the old one (of a triple's, its mention's last token),
    how far it is behind that (0 for the sentence), its branch and mention; and the triples' tokens.
    """

    order: np.ndarray
    soft: np.ndarray
    branches: np.ndarray
    mentions: np.ndarray
    said: np.ndarray


def _woven(
    triples: Triples, tokens: np.ndarray, segments: np.ndarray, most: int, room: int
) -> _Woven:
    places: list[tuple[int, int, int, int]] = []  # order, soft, branch, mention
    said: list[int] = []
    done = branch = 0
    for number, (start, end, name) in enumerate(
        find_mentions(triples.lexicon, tokens, segments), 1
    ):
        places += [(at, 0, 0, number if at >= start else 0) for at in range(done, end - 1)]
        for text in triples.said[name][:most]:
            if len(said) + len(text) <= room:
                branch += 1
                places += [(end - 1, far, branch, number) for far in range(1, len(text) + 1)]
                said += text.tolist()
        places.append((end - 1, 0, 0, number))
        done = end
    places += [(at, 0, 0, 0) for at in range(done, len(tokens))]
    order, soft, branches, mentions = np.asarray(places, np.int32).T
    return _Woven(order, soft, branches, mentions, np.asarray(said, np.int32))


@node
class VisibleMatrix(Attachment):
    """Around an attention core: who sees whom, by `branches` and `mentions` [*lead, B, T] (K-BERT's
    equation 5). Tokens see those of their own branch, the sentence being one; a triple and the
    mention that it stands at see each other.
    """

    branches: jax.Array
    mentions: jax.Array

    def around(self, call: Callable[..., Any], o: AttentionOperands) -> Any:  # type: ignore[override]
        b, m, place = self.branches, self.mentions, jnp.arange(self.branches.shape[-1])
        mask, tokens = o.mask, o.query.shape[1]
        if tokens != len(place):
            raise ValueError(
                f"rows with triples have {len(place)} tokens, attention {tokens}: leave "
                "virtual tokens out"
            )

        def pairs(x):
            return (x[:, None, :, None], x[:, None, None, :])

        (ours, theirs), (at, other) = pairs(b), pairs(m)
        seen = (ours == theirs) | (((ours == 0) | (theirs == 0)) & (at == other) & (at > 0))
        if mask.causal:
            seen &= place[:, None] >= place  # soft positions repeat, places do not
        if mask.segment_ids is not None:
            own, another = pairs(mask.segment_ids)
            seen &= own == another
        local = seen
        if mask.width is not None:
            near, far = pairs(jnp.broadcast_to(mask.positions, b.shape))
            local = seen & (jnp.abs(near - far) < mask.width)
        behind = mask.kv_positions.shape[1] - len(place)  # a cache's slots, empty yet
        given = tuple(jnp.pad(x, [(0, 0)] * 3 + [(0, behind)]) for x in (seen, local))
        return call(o.replace(mask=dataclasses.replace(mask, given=given, dense=True)))


@node
class EntityFusion(Attachment):
    """Beside a token embedding: `table` [E, d], projected by `weight` [d, D] (trained, zero at
    first), is added where `entities` [B, T] say 1 + the number of an entity. `reads_knowledge`
    fills `entities`; without them nothing is added.
    """

    trainable: ClassVar[tuple[str, ...]] = ("weight",)
    table: jax.Array
    weight: jax.Array
    entities: jax.Array | None = None
    name: str = static(default="default")
    frozen: bool = static(default=False)

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = call(*args, **kwargs)
        if self.entities is None:
            return out
        entities = jnp.pad(
            self.entities, ((0, 0), (out.shape[1] - self.entities.shape[1], 0))
        )  # virtual tokens stand before
        vectors = jnp.take(self.table, jnp.maximum(entities - 1, 0), axis=0) @ self.weight
        return out + jnp.where(entities[..., None] > 0, vectors, 0.0).astype(out.dtype)


def entity_fusion(params: Any, table: Any, *, adapter: str = "default") -> Any:
    """`params` with vectors of entities [E, d] to be fused at the token embedding, at first without
    effect.
    """
    path, embedding = token_embedding(params)
    table = jnp.asarray(table, jnp.float32)
    fusion = EntityFusion(
        table=table, weight=jnp.zeros((table.shape[1], embedding.shape[-1])), name=adapter
    )
    return attach(params, {path: {f"entities_{adapter}": fusion}})


def read_entities(path: Path) -> tuple[list[str], np.ndarray]:
    """(names, vectors float32 [E, d]) of an .npz file with `names` and `vectors`. Raises ValueError
    for any other.
    """
    if not path.is_file():
        raise FileNotFoundError(f"file of entity vectors {path} does not exist")
    try:
        with np.load(path, allow_pickle=False) as file:
            names, vectors = [str(n) for n in file["names"]], file["vectors"].astype(np.float32)
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"{path} should be an .npz file with names [E] and vectors [E, d]: {error}"
        ) from error
    if vectors.ndim != 2 or len(names) != len(vectors) or not np.isfinite(vectors).all():
        raise ValueError(
            f"{path} has {len(names)} names and vectors {vectors.shape}; one finite vector for "
            "each name is needed"
        )
    return names, vectors


def mark_entities(rows: Any, lexicon: Lexicon, *, everywhere: bool = False) -> Any:
    """Rows with the field `entities` [N, T]: 1 + the number of the name at the last token of each
    mention (or at every one of its tokens), else 0.
    """
    marked = np.zeros(rows.tokens.shape, np.int32)
    for i, (tokens, segments) in enumerate(zip(rows.tokens, rows.segment_ids, strict=True)):
        for start, end, name in find_mentions(lexicon, tokens, segments):
            marked[i, start if everywhere else end - 1 : end] = name + 1
    return with_fields(rows, entities=marked)


def reads_knowledge(apply: Any) -> Bound:
    """`apply` (of `bind`, or a model) that also takes the fields of rows with triples and entities,
    each [B, T].

    With a key/value cache, which has to be empty, later tokens see of these rows what the
    sentence's tokens see: the sentence.
    """
    return bound_of(apply).wrap(_reading, reads=("branches", "mentions", "entities"))


def _reading(
    call: Callable[..., Any],
    params: Any,
    *args: Any,
    branches: Any = None,
    mentions: Any = None,
    entities: Any = None,
    **kwargs: Any,
) -> Any:
    if entities is not None:

        def fill(_, x):
            return x.replace(entities=entities) if isinstance(x, EntityFusion) else x

        params = map_places(fill, params)
    if branches is None:
        return call(params, *args, **kwargs)
    if (segments := kwargs.get("segment_ids")) is not None:
        branches = jnp.where(
            jnp.asarray(segments) > 0, branches, -1
        )  # what pads a row is no part of the sentence
    out = call(_see(params, branches, mentions), *args, **kwargs)
    return out if kwargs.get("cache") is None else (out[0], _sentence_alone(out[1], branches))


def _sentence_alone(cache: Cache, branches: jax.Array) -> Any:
    """The cache without the triples of its first tokens, in which the segment 0 is seen by none."""
    hidden = jnp.pad(branches > 0, [(0, 0), (0, cache.length - branches.shape[1])])
    return cache.replace(segment_ids=jnp.where(hidden, 0, cache.segment_ids))


def _see(params: Any, branches: jax.Array, mentions: jax.Array) -> Any:
    cores = attention_cores(params)
    if not cores:
        raise ValueError(
            "triples are attached in models of this package alone, whose attention takes a "
            "visible matrix"
        )
    nodes: dict[str, Mapping[str, Attachment]] = {}
    for path in cores:
        lead, _ = layers_of(params, path)

        def wide(x, lead=lead):
            return jnp.broadcast_to(x, (*lead, *x.shape))

        nodes[path] = {KEY: VisibleMatrix(branches=wide(branches), mentions=wide(mentions))}
    return attach(params, nodes)
