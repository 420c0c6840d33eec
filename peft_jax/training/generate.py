"""Batched generation under one compilation: key/value cache, greedy or sampled, stop strings, seeds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peft_jax.core.bind import bind
from peft_jax.core.sharding import fetch
from peft_jax.core.tree import cache_slots, with_adapter_ids
from peft_jax.data import unpadded
from peft_jax.knowledge.inputs import reads_knowledge
from peft_jax.models.attention import CACHE_DTYPES
from peft_jax.training.tables import check_prompts

_CHUNK = 32  # tokens decoded between looks at stop strings


class _Sampling(NamedTuple):
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array


class _State(NamedTuple):
    tokens: jax.Array  # [B, N] generated so far
    count: jax.Array  # how many columns of it
    last: jax.Array  # [B] the newest token
    position: jax.Array  # [B] its position
    done: jax.Array  # [B]
    cache: Any
    keys: jax.Array  # [B]


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
    eos_token_id: int | None = None,
    seed: int = 0,
    adapter_ids: Sequence[int] | None = None,
    cache_dtype: Any = None,
    beside: Callable[[Any], Any] | None = None,
) -> list[Any]:
    """Continuations of `prompts`: texts where these are texts (which needs the tokenizer), else lists of token ids.

    `apply_or_model` is a Flax model or the result of `bind`. Temperature 0 is greedy; otherwise tokens are drawn among
    the `top_k` most likely (0: all) and the most likely ones that hold `top_p` of the probability. A continuation ends at
    the tokenizer's end token, before the first of the `stop` strings, or after `max_tokens`. The draw of a row depends on
    the seed and its place in the batch. `adapter_ids` names each row's adapter out of a bank. `cache_dtype` is that of
    the key/value cache ("int8" and "fp8" hold it in 8 bits); None for the model's. Models without a cache (no
    `empty_cache`) run the whole prefix for each token. `beside` gives the prompts' rows (tokens, positions and segment_ids
    [N, T], padded on the right) more fields that say what is known of them (`attach_triples` and `mark_entities` of
    `knowledge.inputs`).
    Raises ValueError for an empty prompt or list, text without a tokenizer, impossible sampling options, and `beside` of
    prompts of an encoder-decoder or a model without a cache; for ids and positions that the model has no row for.
    """
    apply = apply_or_model if not isinstance(apply_or_model, (nn.Module, nnx.Module)) else _bound(apply_or_model)
    ids, as_text = _encode(prompts, tokenizer, stop, keep_end=_encodes(apply.model))
    if max_tokens < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"need max_tokens >= 1, temperature >= 0, top_k >= 0 and 0 < top_p <= 1; got {max_tokens}, {temperature}, "
            f"{top_k}, {top_p}"
        )
    if adapter_ids is not None:
        if len(adapter_ids) != len(ids):
            raise ValueError(f"there are {len(adapter_ids)} adapter_ids for {len(ids)} prompts")
        params = with_adapter_ids(params, np.asarray(adapter_ids, np.int32))
    if eos_token_id is None and tokenizer is not None:
        eos_token_id = tokenizer.eos_token_id
    check_prompts(apply.model, params, ids, max_tokens)
    eos = -1 if eos_token_id is None else eos_token_id
    run = _cached_rows if hasattr(apply.model, "empty_cache") or _encodes(apply.model) else _plain_rows
    sampling = None
    if temperature > 0:
        sampling = _Sampling(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))
    stopped = functools.partial(_stopped, tokenizer, stop) if stop else None
    if cache_dtype is not None and run is _plain_rows:
        raise ValueError("cache_dtype is of no use to a model without a cache")
    if beside is not None:
        if run is _plain_rows or _encodes(apply.model):
            raise ValueError("what stands beside prompts is read by decoders with a cache alone")
        apply = reads_knowledge(apply)
    more = {} if cache_dtype is None else {"cache_dtype": CACHE_DTYPES.get(cache_dtype, cache_dtype)}
    more |= {} if beside is None else {"beside": beside}
    rows = run(apply, params, ids, max_tokens, eos, sampling, jax.random.key(seed), stopped, **more)
    rows = [_until(row, eos) for row in rows]
    if not as_text:
        return rows
    assert tokenizer is not None  # checked by _encode
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    return [_cut(text, stop) for text in texts]


@functools.lru_cache(maxsize=16)
def _bound(model: Any) -> Any:
    """One `apply` a model, so that a second call finds its compiled programs."""
    return bind(model)


def _encodes(model: Any) -> bool:
    """Whether the model is an encoder-decoder, whose cache begins with what it makes of the prompt."""
    return hasattr(model, "start")


def _encode(prompts: Any, tokenizer: Any, stop: Sequence[str], *, keep_end: bool) -> tuple[list[list[int]], bool]:
    prompts = list(prompts)
    if not prompts:
        raise ValueError("there are no prompts")
    as_text = isinstance(prompts[0], str)
    if (as_text or stop) and tokenizer is None:
        raise ValueError("prompts or stop strings as text need the tokenizer")
    ids = prompts
    if as_text:
        ids = [tokenizer(p, verbose=False)["input_ids"] for p in prompts]
        ends = lambda x: not keep_end and len(x) > 1 and x[-1] == tokenizer.eos_token_id
        ids = [x[:-1] if ends(x) else x for x in ids]
    ids = [[int(t) for t in row] for row in ids]
    if empty := [i for i, row in enumerate(ids) if not row]:
        raise ValueError(f"prompt {empty[0]} is empty; begin with the start token")
    return ids, as_text


def _until(row: np.ndarray, eos: int) -> list[int]:
    ids = row.tolist()
    return ids[: ids.index(eos)] if eos in ids else ids


def _cut(text: str, stop: Sequence[str]) -> str:
    ends = [text.index(s) for s in stop if s in text]
    return text[: min(ends)] if ends else text


def _stopped(tokenizer: Any, stop: Sequence[str], rows: np.ndarray) -> np.ndarray:
    texts = tokenizer.batch_decode(np.maximum(rows, 0), skip_special_tokens=True)
    return np.asarray([any(s in text for s in stop) for text in texts])


def sample(logits: jax.Array, sampling: _Sampling | None, keys: jax.Array) -> jax.Array:
    """One token for each row of logits [B, V] with a key each; greedy without `sampling`."""
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / sampling.temperature
    whole = (sampling.top_k == 0) & (sampling.top_p >= 1)  # nothing to leave out, so nothing to sort
    logits = jax.lax.cond(whole, lambda x: x, functools.partial(_likeliest, sampling), logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _likeliest(sampling: _Sampling, logits: jax.Array) -> jax.Array:
    """The logits [B, V] with -inf where a token is not among the `top_k` and not in the `top_p`."""
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    V = logits.shape[-1]
    kth = jnp.take(ordered, jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V) - 1, axis=-1)
    ordered = jnp.where(ordered >= kth[:, None], ordered, -jnp.inf)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # 0 of the first, which is always kept
    kept = ((before < sampling.top_p) | (sampling.top_p >= 1)) & (ordered > -jnp.inf)
    lowest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


# With a cache: prompts are padded on the left, so that all rows write the same slots.


class _Prompts(NamedTuple):
    tokens: np.ndarray  # [N, T]
    positions: np.ndarray
    segment_ids: np.ndarray  # 1, and 0 for padding


def _prompt_rows(ids: Sequence[Sequence[int]], beside: Callable[[Any], Any] | None) -> dict[str, np.ndarray]:
    """The fields of the prompts' rows, padded on the left to a multiple of 16."""
    shape = (len(ids), _round_up(max(map(len, ids)), 16))
    rows: Any = _Prompts(*(np.zeros(shape, np.int32) for _ in _Prompts._fields))
    for i, row in enumerate(ids):
        n = len(row)
        rows.tokens[i, :n], rows.positions[i, :n], rows.segment_ids[i, :n] = row, np.arange(n), 1
    rows = unpadded(rows if beside is None else beside(rows), 16)
    padding = (rows.segment_ids == 0).sum(1)
    moved = lambda field: np.stack([np.roll(row, n) for row, n in zip(field, padding, strict=True)])
    return {name: moved(field) for name, field in rows._asdict().items()}


def _cached_rows(apply, params, ids, max_tokens, eos, sampling, key, stopped, cache_dtype=None, beside=None) -> np.ndarray:
    chunks = -(-max_tokens // _CHUNK)
    keys = jax.random.split(key, len(ids))
    prefill, decode = _programs(apply)
    rows = _prompt_rows(ids, beside)
    state = prefill(params, rows, keys, eos, sampling, slots=chunks * _CHUNK, cache_dtype=cache_dtype)
    done = np.zeros(len(ids), bool)
    for _ in range(chunks):
        state = decode(params, state, done, eos, sampling, max_tokens)
        count = int(state.count)
        done = fetch(state.done)
        if stopped is not None:
            done = done | stopped(fetch(state.tokens)[:, :count])
        if done.all():
            break
    return fetch(state.tokens)[:, :count]


@functools.lru_cache(maxsize=16)
def _programs(apply: Any) -> tuple[Any, Any]:
    """(prefill, decode), compiled once for an `apply` and shapes."""
    prefill = jax.jit(functools.partial(_prefill, apply), static_argnames=("slots", "cache_dtype"))
    return prefill, jax.jit(functools.partial(_decode, apply), donate_argnums=1)


def _prefill(apply, params, rows: dict[str, Any], keys, eos, sampling, *, slots: int, cache_dtype: Any) -> _State:
    tokens, positions = rows["tokens"], rows["positions"]
    inputs = {name: x for name, x in rows.items() if name != "tokens"}
    B, T = tokens.shape
    more = [] if cache_dtype is None else [jnp.dtype(cache_dtype)]
    if _encodes(apply.model):
        cache = apply(params, tokens, rows["segment_ids"], slots, *more, method="start")
        tokens, positions = jnp.full((B, 1), apply.model.config.start_token, jnp.int32), jnp.zeros((B, 1), jnp.int32)
        logits, cache = apply(params, tokens, positions=positions, cache=cache, method="decode")
    else:
        cache = apply.model.empty_cache(B, cache_slots(params) + T + slots, *more)
        logits, cache = apply(params, tokens, cache=cache, **inputs)
    first = sample(logits[:, -1], sampling, jax.vmap(lambda k: jax.random.fold_in(k, 0))(keys))
    out = jnp.full((B, slots), eos, jnp.int32).at[:, 0].set(first)
    return _State(out, jnp.int32(1), first, positions[:, -1] + 1, first == eos, cache, keys)


def _decode(apply, params, state: _State, done, eos, sampling, most) -> _State:
    """Up to a chunk of further tokens (to the next multiple of it, and to `most`); rows that are `done` get no more."""
    state = state._replace(done=state.done | done)
    end = jnp.minimum((state.count // _CHUNK + 1) * _CHUNK, most)
    return _decode_until(apply, params, state, eos, sampling, end)


def _decode_until(apply, params, state: _State, eos, sampling, end) -> _State:
    """Further tokens, until there are `end` of them or all rows have ended."""

    def more(s: _State) -> jax.Array:
        return (s.count < end) & ~s.done.all()

    def one(s: _State) -> _State:
        method = {"method": "decode"} if _encodes(apply.model) else {}
        logits, cache = apply(params, s.last[:, None], positions=s.position[:, None], cache=s.cache, **method)
        keys = jax.vmap(jax.random.fold_in, (0, None))(s.keys, s.count)
        token = jnp.where(s.done, eos, sample(logits[:, -1], sampling, keys))
        tokens = jax.lax.dynamic_update_slice_in_dim(s.tokens, token[:, None], s.count, axis=1)
        return _State(tokens, s.count + 1, token, s.position + 1, s.done | (token == eos), cache, s.keys)

    return jax.lax.while_loop(more, one, state)


def continuations(
    apply: Any,
    params: Any,
    tokens: jax.Array,
    segment_ids: jax.Array,
    key: jax.Array,
    *,
    max_tokens: int,
    eos: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> jax.Array:
    """`max_tokens` sampled tokens [B, max_tokens] for prompts [B, T] that are padded on the left (segment 0), `eos` after a
    row's end. To be traced inside a jitted function; temperature 0 is greedy. `eos` of -1 ends no row.
    """
    positions = jnp.maximum(jnp.cumsum(segment_ids > 0, axis=1) - 1, 0).astype(jnp.int32)
    sampling = _Sampling(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p)) if temperature > 0 else None
    keys = jax.random.split(key, tokens.shape[0])
    rows = {"tokens": tokens, "positions": positions, "segment_ids": (segment_ids > 0).astype(jnp.int32)}
    state = _prefill(apply, params, rows, keys, eos, sampling, slots=max_tokens, cache_dtype=None)
    return _decode_until(apply, params, state, eos, sampling, max_tokens).tokens


# Without a cache: prompts are padded on the right and the whole buffer runs for each token.


def _plain_rows(apply, params, ids, max_tokens, eos, sampling, key, stopped) -> np.ndarray:
    lengths = np.asarray([len(row) for row in ids], np.int32)
    buffer = np.zeros((len(ids), _round_up(int(lengths.max()) + max_tokens, 16)), np.int32)
    for i, row in enumerate(ids):
        buffer[i, : len(row)] = row
    keys = jax.random.split(key, len(ids))
    step = _plain_program(apply)
    done = np.zeros(len(ids), bool)
    generated = np.full((len(ids), max_tokens), eos, np.int32)
    for n in range(max_tokens):
        token = fetch(step(params, buffer, lengths + n - 1, jax.vmap(jax.random.fold_in, (0, None))(keys, n), sampling))
        token = np.where(done, eos, token)
        generated[:, n] = token
        buffer[np.arange(len(ids)), lengths + n] = np.maximum(token, 0)
        done |= token == eos
        if stopped is not None and n % _CHUNK == _CHUNK - 1:
            done |= stopped(generated[:, : n + 1])
        if done.all():
            return generated[:, : n + 1]
    return generated


@functools.lru_cache(maxsize=16)
def _plain_program(apply: Any) -> Any:
    def step(params, buffer, last, keys, sampling):
        logits = apply(params, buffer)
        return sample(jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0], sampling, keys)

    return jax.jit(step)
