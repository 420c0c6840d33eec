"""Batched generation under one compilation: key/value cache, greedy or sampled, stop strings,
seeds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from peft_jax.core.bind import Bound, bound_of
from peft_jax.core.prepare import with_adapter_ids
from peft_jax.core.sharding import fetch
from peft_jax.data import unpadded
from peft_jax.generation.ends import before_stop, end_tokens, ends_of, is_end, stopped, until
from peft_jax.generation.programs import CHUNK, decode, next_tokens, prefill
from peft_jax.generation.sampling import Sampling, make_sampling
from peft_jax.models.cache import CACHE_DTYPES
from peft_jax.models.tables import check_prompts


def generate(
    apply_or_model: Any,
    params: Any,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    tokenizer: Any = None,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    eos_token_id: int | Sequence[int] | None = None,
    seed: int = 0,
    adapter_ids: Sequence[int] | None = None,
    cache_dtype: Any = None,
    beside: Callable[[Any], Any] | None = None,
) -> list[Any]:
    """Continuations of `prompts`: texts where these are texts (which needs the tokenizer), else
    lists of token ids.

    `apply_or_model` is a Flax model or the result of `bind`; what was compiled is kept with it.
    Temperature 0 is greedy; otherwise tokens are drawn among the `top_k` most likely (0: all) and
    the most likely ones that hold `top_p` of the probability. A continuation ends at any of the
    tokens `eos_token_id`, before the first of the `stop` strings (which may be special tokens), or
    after `max_tokens`. By default the ends are those of the model's generation config (else its
    config), of the tokenizer and of a turn in its chat template; an empty list is none. The draw of
    a row depends on the seed and its place in the batch. `adapter_ids` names each row's adapter out
    of a bank. `cache_dtype` is that of the key/value cache ("int8" and "fp8" hold it in 8 bits);
    None for the model's. Models without a cache (no `empty_cache`) run the whole prefix for each
    token. `beside` gives the prompts' rows (tokens, positions and segment_ids [N, T], padded on the
    right) more fields, which `apply_or_model` reads (as that of `reads_knowledge` does). Raises
    ValueError for an empty prompt or list, text without a tokenizer, impossible sampling options,
    an `eos_token_id` that is no token's, `beside` of prompts of an encoder-decoder or a model
    without a cache, fields beside prompts that nothing reads, and ids and positions that the model
    has no row for.
    """
    apply = bound_of(apply_or_model)
    ids, as_text = _encode(prompts, tokenizer, stop, keep_end=apply.encoder_decoder)
    if max_tokens < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            "need max_tokens >= 1, temperature >= 0, top_k >= 0 and 0 < top_p <= 1; got "
            f"{max_tokens}, {temperature}, "
            f"{top_k}, {top_p}"
        )
    if adapter_ids is not None:
        if len(adapter_ids) != len(ids):
            raise ValueError(f"there are {len(adapter_ids)} adapter_ids for {len(ids)} prompts")
        params = with_adapter_ids(params, np.asarray(adapter_ids, np.int32))
    check_prompts(apply.model, params, ids, max_tokens)
    ask = _Request(
        ids,
        max_tokens,
        ends_of(end_tokens(apply.model, tokenizer) if eos_token_id is None else eos_token_id),
        make_sampling(temperature, top_k, top_p),
        jax.random.split(jax.random.key(seed), len(ids)),
        functools.partial(stopped, tokenizer, stop) if stop else None,
    )
    if apply.cache or apply.encoder_decoder:
        kind = CACHE_DTYPES.get(cache_dtype, cache_dtype)
        rows = _with_cache(apply, params, ask, _prompt_rows(apply, ids, beside), kind)
    elif cache_dtype is not None:
        raise ValueError("cache_dtype is of no use to a model without a cache")
    elif beside is not None:
        raise ValueError(_NOT_BESIDE)
    else:
        rows = _without_cache(apply, params, ask)
    rows = [until(row, ask.ends) for row in rows]
    if tokenizer is None or not (as_text or stop):
        return rows
    cut = [before_stop(tokenizer, row, stop) for row in rows]
    return [text if as_text else row for row, text in cut]


_NOT_BESIDE = "what stands beside prompts is read by decoders with a cache alone"


class _Request(NamedTuple):
    """What is asked for: the prompts' tokens, how many more, and how they are drawn and end."""

    ids: Sequence[Sequence[int]]
    max_tokens: int
    ends: np.ndarray
    sampling: Sampling | None
    keys: jax.Array  # one for each row
    stopped: Callable[[np.ndarray], np.ndarray] | None


def _encode(
    prompts: Any, tokenizer: Any, stop: Sequence[str], *, keep_end: bool
) -> tuple[list[list[int]], bool]:
    prompts = list(prompts)
    if not prompts:
        raise ValueError("there are no prompts")
    as_text = isinstance(prompts[0], str)
    if (as_text or stop) and tokenizer is None:
        raise ValueError("prompts or stop strings as text need the tokenizer")
    ids = prompts
    if as_text:
        ids = [tokenizer(p, verbose=False)["input_ids"] for p in prompts]

        def ends(x):
            return not keep_end and len(x) > 1 and x[-1] == tokenizer.eos_token_id

        ids = [x[:-1] if ends(x) else x for x in ids]
    ids = [[int(t) for t in row] for row in ids]
    if empty := [i for i, row in enumerate(ids) if not row]:
        raise ValueError(f"prompt {empty[0]} is empty; begin with the start token")
    return ids, as_text


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


# With a cache: prompts are padded on the left, so that all rows write the same slots.


class _Prompts(NamedTuple):
    tokens: np.ndarray  # [N, T]
    positions: np.ndarray
    segment_ids: np.ndarray  # 1, and 0 for padding


def _prompt_rows(
    apply: Bound, ids: Sequence[Sequence[int]], beside: Callable[[Any], Any] | None
) -> dict[str, np.ndarray]:
    """The fields of the prompts' rows, padded on the left to a multiple of 16."""
    shape = (len(ids), _round_up(max(map(len, ids)), 16))
    rows: Any = _Prompts(*(np.zeros(shape, np.int32) for _ in _Prompts._fields))
    for i, row in enumerate(ids):
        n = len(row)
        rows.tokens[i, :n], rows.positions[i, :n], rows.segment_ids[i, :n] = row, np.arange(n), 1
    if beside is not None:
        rows = _beside(apply, rows, beside)
    rows = unpadded(rows, 16)
    padding = (rows.segment_ids == 0).sum(1)

    def moved(field):
        return np.stack([np.roll(row, n) for row, n in zip(field, padding, strict=True)])

    return {name: moved(field) for name, field in rows._asdict().items()}


def _beside(apply: Bound, rows: _Prompts, beside: Callable[[Any], Any]) -> Any:
    """The rows with what stands beside them."""
    if apply.encoder_decoder:
        raise ValueError(_NOT_BESIDE)
    made = beside(rows)
    if unread := set(made._fields) - set(_Prompts._fields) - set(apply.reads):
        raise ValueError(
            f"the prompts' rows have {', '.join(sorted(unread))}, which the model's call does not "
            "take: generate with knowledge.inputs.reads_knowledge(model) in place of the model"
        )
    return made


def _with_cache(
    apply: Bound, params: Any, ask: _Request, rows: dict[str, np.ndarray], cache_dtype: Any
) -> np.ndarray:
    chunks = -(-ask.max_tokens // CHUNK)
    begin = apply.program(prefill, static_argnames=("slots", "cache_dtype"))
    go_on = apply.program(decode, donate_argnums=2, static_argnames="cache_dtype")
    how = (ask.ends, ask.sampling)
    kind = {"cache_dtype": cache_dtype}
    state = begin(apply, params, rows, ask.keys, *how, slots=chunks * CHUNK, **kind)
    count, done = 0, np.zeros(len(ask.ids), bool)
    for _ in range(chunks):
        state = go_on(apply, params, state, rows, done, *how, ask.max_tokens, **kind)
        count = int(state.length)
        done = fetch(state.done)
        if ask.stopped is not None:
            done = done | ask.stopped(fetch(state.tokens)[:, :count])
        if done.all():
            break
    return fetch(state.tokens)[:, :count]


# Without a cache: prompts are padded on the right and the whole buffer runs for each token.


def _without_cache(apply: Bound, params: Any, ask: _Request) -> np.ndarray:
    lengths = np.asarray([len(row) for row in ask.ids], np.int32)
    rows = np.arange(len(lengths))
    buffer = np.zeros((len(rows), _round_up(int(lengths.max()) + ask.max_tokens, 16)), np.int32)
    for i, row in enumerate(ask.ids):
        buffer[i, : len(row)] = row
    step = apply.program(next_tokens)
    done = np.zeros(len(rows), bool)
    generated = np.full((len(rows), ask.max_tokens), ask.ends[0], np.int32)
    for n in range(ask.max_tokens):
        keys = jax.vmap(jax.random.fold_in, (0, None))(ask.keys, n)
        token = fetch(step(apply, params, buffer, lengths + n - 1, keys, ask.sampling))
        token = np.where(done, ask.ends[0], token)
        generated[:, n] = token
        buffer[rows, lengths + n] = np.maximum(token, 0)
        done |= is_end(token, ask.ends)
        if ask.stopped is not None and n % CHUNK == CHUNK - 1:
            done |= ask.stopped(generated[:, : n + 1])
        if done.all():
            return generated[:, : n + 1]
    return generated
