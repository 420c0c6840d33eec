"""Distillation between different tokenizers: which of the two texts' tokens to compare, and how.

Two models may be compared where both have read the same text: at the tokens that end at the same
character ("span"), or, as in Boizard et al. 2024, at the tokens of the same number ("position").
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.data import Record
from peft_jax.data.spans import bytes_of_characters, with_offsets

logger = logging.getLogger("peft_jax")
Alignment = Literal["span", "position"]


class TwofoldRows(NamedTuple):
    """Texts as a student and a teacher read them, each array [N, ...].

    tokens, targets, positions, segment_ids int32 [N, T] and float32 weights [N, T] of the student;
    teacher_tokens and teacher_segment_ids [N, S]; and the places to compare: compared_at [N, P] in
    the student's row, teacher_at [N, P] in the teacher's, compared [N, P] (1, or 0 for filling).
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    teacher_tokens: np.ndarray
    teacher_segment_ids: np.ndarray
    compared_at: np.ndarray
    teacher_at: np.ndarray
    compared: np.ndarray


def uld(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Sum of differences between the probabilities in order of size, the smaller vocabulary filled
    up with zeros (universal logit distillation, Boizard et al. 2024, arXiv:2402.12030, equation 5),
    of log-probabilities [..., V] and [..., U].
    """
    p, q = (jnp.sort(jnp.exp(x), axis=-1)[..., ::-1] for x in (student, teacher))
    size = max(p.shape[-1], q.shape[-1])

    def fill(x):
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])

    return jnp.abs(fill(p) - fill(q)).sum(-1)


def tokenizer_hash(tokenizer: Any) -> str:
    """A short hash of a tokenizer's vocabulary."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:16]


def shared_tokens(student: Any, teacher: Any) -> tuple[np.ndarray, np.ndarray]:
    """(ids of the student's tokenizer, ids of the teacher's) of the tokens that stand for the same
    text, int32 [n].

    Raises ValueError where there is none.
    """
    ours, theirs = _by_text(student), _by_text(teacher)
    common = sorted(ours.keys() & theirs.keys(), key=lambda text: ours[text])
    if not common:
        raise ValueError("the two tokenizers share no token; use divergence: uld")
    return np.asarray([ours[t] for t in common], np.int32), np.asarray(
        [theirs[t] for t in common], np.int32
    )


def _by_text(tokenizer: Any) -> dict[str | bytes, int]:
    """What each token stands for (bytes; special tokens by their role) -> its id."""
    found: dict[str | bytes, int] = {}
    special = {tokenizer.bos_token_id: "<bos>", tokenizer.eos_token_id: "<eos>"}
    known, hidden = bytes_of_characters(), set(tokenizer.all_special_ids)
    byte_level = any("\u0120" in token for token in tokenizer.get_vocab())
    for token, i in sorted(tokenizer.get_vocab().items(), key=lambda x: x[1]):
        if i in special:
            found.setdefault(special[i], i)
        elif i in hidden:
            continue
        elif byte_level and all(c in known for c in token):
            found.setdefault(bytes(known[c] for c in token), i)
        else:
            found.setdefault(token.replace("\u2581", " ").encode(), i)
    return found


def encode_twofold(
    records: Sequence[Record],
    student: Any,
    teacher: Any,
    length: int,
    *,
    teacher_length: int | None = None,
    context: str = "",
    alignment: Alignment = "span",
) -> TwofoldRows:
    """Rows of texts or completions for two tokenizers, one record a row, cut at `length` and
    `teacher_length` tokens (by default twice as many); `context` stands before what the teacher
    reads. Completions are compared in what is to be learnt.

    Raises ValueError where a tokenizer gives no character offsets, or nothing is to be compared.
    """
    wide = teacher_length or 2 * length
    rows = []
    for record in records:
        prompt = record.value.get("prompt", "")
        text = (
            prompt + record.value["completion"]
            if "completion" in record.value
            else record.value["text"]
        )
        ours, ends = _tokens(student, text, length + 1)
        theirs, other_ends = _tokens(teacher, text, wide + 1, context)
        learnt = ends[:-1] >= len(prompt)
        at, teacher_at = _pairs(ends[:-1], other_ends[:-1], len(prompt), alignment)
        if len(at):
            rows.append((ours, theirs, learnt, at, teacher_at))
    if not rows:
        raise ValueError(
            "there is no text of which both tokenizers have a common place; give longer rows, or "
            "other data"
        )
    if len(rows) < len(records):
        missing = len(records) - len(rows)
        logger.warning(
            "%d of %d records have no common place within the rows and are left out",
            missing,
            len(records),
        )
    return _filled(rows, length, wide)


def _tokens(
    tokenizer: Any, text: str, most: int, context: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """(token ids, how many characters of the text have been read with each, -1 before the end of a
    context). Special tokens stand before the text, or after it. The context's tokens are its own,
    so that the text's are those of the text alone.
    """
    encoded = with_offsets(tokenizer, text, add_special_tokens=not context)
    ids, ends = list(encoded["input_ids"]), [b for _, b in encoded["offset_mapping"]]
    special = set(tokenizer.all_special_ids)
    before = next((i for i, token in enumerate(ids) if token not in special), len(ids))
    ends = [0] * before + [end or len(text) for end in ends[before:]]
    if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
        ids, ends = [*ids, tokenizer.eos_token_id], [*ends, len(text)]
    if context:
        before_it = tokenizer(context, verbose=False)["input_ids"]
        before_it = (
            before_it[:-1]
            if len(before_it) > 1 and before_it[-1] == tokenizer.eos_token_id
            else before_it
        )
        ids, ends = [*before_it, *ids], [*[-1] * (len(before_it) - 1), 0, *ends]
    return np.asarray(ids[:most], np.int32), np.asarray(ends[:most], np.int64)


def _pairs(
    ends: np.ndarray, others: np.ndarray, start: int, alignment: Alignment
) -> tuple[np.ndarray, np.ndarray]:
    """Places of the two rows after which both have read the same text, from character `start`
    on.
    """
    if alignment == "position":
        ours, theirs = np.flatnonzero(ends >= start), np.flatnonzero(others >= start)
        n = min(len(ours), len(theirs))
        return ours[:n], theirs[:n]
    pairs = []
    for end in np.intersect1d(ends[ends >= start], others[others >= start]):
        mine, other = np.flatnonzero(ends == end), np.flatnonzero(others == end)
        whole = len(mine) == len(other)  # as the bytes of one character
        pairs += list(zip(mine, other, strict=True)) if whole else [(mine[-1], other[-1])]
    at = np.asarray(pairs, int).reshape(-1, 2)
    return at[:, 0], at[:, 1]


def _filled(rows: Any, length: int, wide: int) -> TwofoldRows:
    N, most = len(rows), max(len(at) for *_, at, _ in rows)
    shapes = [(N, length)] * 5 + [(N, wide)] * 2 + [(N, most)] * 3
    types = [
        np.int32,
        np.int32,
        np.float32,
        np.int32,
        np.int32,
        np.int32,
        np.int32,
        np.int32,
        np.int32,
        np.float32,
    ]
    made = TwofoldRows(*(np.zeros(s, t) for s, t in zip(shapes, types, strict=True)))
    for i, (ours, theirs, learnt, at, teacher_at) in enumerate(rows):
        n, m = len(ours) - 1, len(theirs) - 1
        made.tokens[i, :n], made.targets[i, :n], made.weights[i, :n] = ours[:-1], ours[1:], learnt
        made.positions[i, :n], made.segment_ids[i, :n] = np.arange(n), 1
        made.teacher_tokens[i, :m], made.teacher_segment_ids[i, :m] = theirs[:-1], 1
        (
            made.compared_at[i, : len(at)],
            made.teacher_at[i, : len(at)],
            made.compared[i, : len(at)],
        ) = at, teacher_at, 1.0
    return made
