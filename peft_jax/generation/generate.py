"""Batched generation under one compilation: key/value cache, greedy or sampled, stop strings,
seeds.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peft_jax.core.bind import bind
from peft_jax.core.prepare import cache_slots, with_adapter_ids
from peft_jax.core.sharding import fetch
from peft_jax.data import unpadded
from peft_jax.hub.generation_config import end_tokens
from peft_jax.knowledge.inputs import reads_knowledge
from peft_jax.models.attention import CACHE_DTYPES
from peft_jax.models.tables import check_prompts

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
    eos_token_id: int | Sequence[int] | None = None,
    seed: int = 0,
    adapter_ids: Sequence[int] | None = None,
    cache_dtype: Any = None,
    beside: Callable[[Any], Any] | None = None,
) -> list[Any]:
    """Continuations of `prompts`: texts where these are texts (which needs the tokenizer), else
    lists of token ids.

    `apply_or_model` is a Flax model or the result of `bind`. Temperature 0 is greedy; otherwise
    tokens are drawn among the `top_k` most likely (0: all) and the most likely ones that hold
    `top_p` of the probability. A continuation ends at any of the tokens `eos_token_id`, before the
    first of the `stop` strings (which may be special tokens), or after `max_tokens`. By default the
    ends are those of the model's generation config (else its config), of the tokenizer and of a
    turn in its chat template; an empty list is none. The draw of a row depends on the seed and its
    place in the batch. `adapter_ids` names each row's adapter out of a bank. `cache_dtype` is that
    of the key/value cache ("int8" and "fp8" hold it in 8 bits); None for the model's. Models
    without a cache (no `empty_cache`) run the whole prefix for each token. `beside` gives the
    prompts' rows (tokens, positions and segment_ids [N, T], padded on the right) more fields that
    say what is known of them (`attach_triples` and `mark_entities` of `knowledge.inputs`). Raises
    ValueError for an empty prompt or list, text without a tokenizer, impossible sampling options,
    an `eos_token_id` that is no token's, `beside` of prompts of an encoder-decoder or a model
    without a cache, and ids and positions that the model has no row for.
    """
    apply = (
        apply_or_model
        if not isinstance(apply_or_model, (nn.Module, nnx.Module))
        else _bound(apply_or_model)
    )
    ids, as_text = _encode(prompts, tokenizer, stop, keep_end=_encodes(apply.model))
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
    ends = _ends(end_tokens(apply.model, tokenizer) if eos_token_id is None else eos_token_id)
    run = (
        _cached_rows
        if hasattr(apply.model, "empty_cache") or _encodes(apply.model)
        else _plain_rows
    )
    stopped = functools.partial(_stopped, tokenizer, stop) if stop else None
    if cache_dtype is not None and run is _plain_rows:
        raise ValueError("cache_dtype is of no use to a model without a cache")
    if beside is not None:
        if run is _plain_rows or _encodes(apply.model):
            raise ValueError("what stands beside prompts is read by decoders with a cache alone")
        apply = reads_knowledge(apply)
    more = (
        {} if cache_dtype is None else {"cache_dtype": CACHE_DTYPES.get(cache_dtype, cache_dtype)}
    )
    more |= {} if beside is None else {"beside": beside}
    sampling = _sampling(temperature, top_k, top_p)
    rows = run(
        apply, params, ids, max_tokens, ends, sampling, jax.random.key(seed), stopped, **more
    )
    rows = [_until(row, ends) for row in rows]
    if tokenizer is None or not (as_text or stop):
        return rows
    cut = [_before_stop(tokenizer, row, stop) for row in rows]
    return [text if as_text else row for row, text in cut]


@functools.lru_cache(maxsize=16)
def _bound(model: Any) -> Any:
    """One `apply` a model, so that a second call finds its compiled programs."""
    return bind(model)


def _encodes(model: Any) -> bool:
    """Whether the model is an encoder-decoder, whose cache begins with what it makes of the
    prompt.
    """
    return hasattr(model, "start")


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


def _ends(tokens: int | Sequence[int]) -> np.ndarray:
    """Which tokens end a row [E], as an array that is never empty: -1, which no row has, where
    there are none.
    """
    ends = np.atleast_1d(np.asarray(tokens))
    if ends.ndim > 1 or (ends.size and not np.issubdtype(ends.dtype, np.integer)):
        raise ValueError(
            f"eos_token_id must be a token's number, or a list of such, got {tokens!r}"
        )
    ends = ends[ends >= 0].astype(np.int32)
    return ends if ends.size else np.asarray([-1], np.int32)


def _is_end(tokens: Any, ends: Any) -> Any:
    """Whether each of the tokens [...] is one of the ends [E]."""
    return (tokens[..., None] == ends).any(-1)


def _until(row: np.ndarray, ends: np.ndarray) -> list[int]:
    """The tokens before the first that is an end."""
    return row[: int(np.append(_is_end(row, ends), True).argmax())].tolist()


# Stop strings are looked for in the text as it is given back and in the text with its special
# tokens.


def _stopped(tokenizer: Any, stop: Sequence[str], rows: np.ndarray) -> np.ndarray:
    texts = zip(
        *(
            tokenizer.batch_decode(np.maximum(rows, 0), skip_special_tokens=skip)
            for skip in (True, False)
        ),
        strict=True,
    )
    return np.asarray([any(s in text for s in stop for text in both) for both in texts])


def _before_stop(tokenizer: Any, row: list[int], stop: Sequence[str]) -> tuple[list[int], str]:
    """The tokens that are whole before the first of the stop strings, and the text before it
    without special tokens.
    """
    found = [_before_stop_in(tokenizer, row, stop, skip) for skip in (True, False)]
    return min(found, key=lambda both: len(both[1]))


def _before_stop_in(
    tokenizer: Any, row: list[int], stop: Sequence[str], skip: bool
) -> tuple[list[int], str]:
    """The same for the text with, or (`skip`) without special tokens."""
    decode = functools.partial(tokenizer.decode, skip_special_tokens=skip)
    text = decode(row)
    starts = [text.index(s) for s in stop if s in text]
    if not starts:
        return row, tokenizer.decode(row, skip_special_tokens=True)
    start = min(starts)
    n = bisect.bisect_right(range(len(row)), start, key=lambda n: len(decode(row[:n]))) - 1
    if skip:
        return row[:n], text[:start]
    begun = "" if row[n] in tokenizer.all_special_ids else text[len(decode(row[:n])) : start]
    return row[:n], tokenizer.decode(row[:n], skip_special_tokens=True) + begun


def _sampling(temperature: float, top_k: int, top_p: float) -> _Sampling | None:
    """What `sample` is given; None for the greedy choice. A temperature too small for float32 is
    its smallest number.
    """
    if temperature <= 0:
        return None
    temperature = max(temperature, float(jnp.finfo(jnp.float32).tiny))
    return _Sampling(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))


def sample(logits: jax.Array, sampling: _Sampling | None, keys: jax.Array) -> jax.Array:
    """One token for each row of logits [B, V] with a key each; greedy without `sampling`."""
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32)
    logits = (
        logits - logits.max(-1, keepdims=True)
    ) / sampling.temperature  # the highest is 0 at any temperature
    whole = (sampling.top_k == 0) & (
        sampling.top_p >= 1
    )  # nothing to leave out, so nothing to sort
    logits = jax.lax.cond(whole, lambda x: x, functools.partial(_likeliest, sampling), logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _likeliest(sampling: _Sampling, logits: jax.Array) -> jax.Array:
    """The logits [B, V] with -inf where a token is not among the `top_k` and not in the `top_p`."""
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    V = logits.shape[-1]
    kth = jnp.take(
        ordered, jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V) - 1, axis=-1
    )
    ordered = jnp.where(ordered >= kth[:, None], ordered, -jnp.inf)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = (
        jnp.cumsum(probabilities, axis=-1) - probabilities
    )  # 0 of the first, which is always kept
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


def _prompt_rows(
    ids: Sequence[Sequence[int]], beside: Callable[[Any], Any] | None
) -> dict[str, np.ndarray]:
    """The fields of the prompts' rows, padded on the left to a multiple of 16."""
    shape = (len(ids), _round_up(max(map(len, ids)), 16))
    rows: Any = _Prompts(*(np.zeros(shape, np.int32) for _ in _Prompts._fields))
    for i, row in enumerate(ids):
        n = len(row)
        rows.tokens[i, :n], rows.positions[i, :n], rows.segment_ids[i, :n] = row, np.arange(n), 1
    rows = unpadded(rows if beside is None else beside(rows), 16)
    padding = (rows.segment_ids == 0).sum(1)

    def moved(field):
        return np.stack([np.roll(row, n) for row, n in zip(field, padding, strict=True)])

    return {name: moved(field) for name, field in rows._asdict().items()}


def _cached_rows(
    apply, params, ids, max_tokens, ends, sampling, key, stopped, cache_dtype=None, beside=None
) -> np.ndarray:
    chunks = -(-max_tokens // _CHUNK)
    keys = jax.random.split(key, len(ids))
    prefill, decode = _programs(apply)
    rows = _prompt_rows(ids, beside)
    state = prefill(
        params, rows, keys, ends, sampling, slots=chunks * _CHUNK, cache_dtype=cache_dtype
    )
    decode = functools.partial(decode, cache_dtype=cache_dtype)
    done = np.zeros(len(ids), bool)
    for _ in range(chunks):
        state = decode(params, state, rows, done, ends, sampling, max_tokens)
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
    return prefill, jax.jit(
        functools.partial(_decode, apply), donate_argnums=1, static_argnames="cache_dtype"
    )


def _prefill(
    apply, params, rows: dict[str, Any], keys, ends, sampling, *, slots: int, cache_dtype: Any
) -> _State:
    tokens, positions = rows["tokens"], rows["positions"]
    B, T = tokens.shape
    more = _kind(cache_dtype)
    if _encodes(apply.model):
        cache = apply(params, tokens, rows["segment_ids"], slots, *more, method="start")
        tokens, positions = (
            jnp.full((B, 1), apply.model.config.start_token, jnp.int32),
            jnp.zeros((B, 1), jnp.int32),
        )
        logits, cache = apply(params, tokens, positions=positions, cache=cache, method="decode")
    else:
        cache = apply.model.empty_cache(B, cache_slots(params) + T + slots, *more)
        logits, cache = _last_logits(apply, params, tokens, cache=cache, **_beside(rows))
    first = sample(logits[:, -1], sampling, jax.vmap(lambda k: jax.random.fold_in(k, 0))(keys))
    out = jnp.full((B, slots), ends[0], jnp.int32).at[:, 0].set(first)
    return _State(out, jnp.int32(1), first, positions[:, -1] + 1, _is_end(first, ends), cache, keys)


def _last_logits(apply, params, tokens: jax.Array, **inputs: Any) -> tuple[jax.Array, Any]:
    """(logits [B, 1, V] of each row's last token, the new cache); those of all tokens [B, T, V]
    where the model has no `unembed` apart.
    """
    if not hasattr(apply.model, "unembed"):
        return apply(params, tokens, **inputs)
    hidden, cache = apply(params, tokens, method="hidden", **inputs)
    return apply(params, hidden[:, -1:], method="unembed"), cache


def _beside(rows: dict[str, Any]) -> dict[str, Any]:
    """The rows' fields but the tokens."""
    return {name: x for name, x in rows.items() if name != "tokens"}


def _kind(cache_dtype: Any) -> list[Any]:
    """The cache's dtype as a further argument, none for the model's own."""
    return [] if cache_dtype is None else [jnp.dtype(cache_dtype)]


def _decode(
    apply, params, state: _State, rows, done, ends, sampling, most, *, cache_dtype: Any
) -> _State:
    """Up to a chunk of further tokens (to the next multiple of it, and to `most`); rows that are
    `done` get no more.
    """
    state = state._replace(done=state.done | done)
    end = jnp.minimum((state.count // _CHUNK + 1) * _CHUNK, most)
    return _decode_until(apply, params, state, rows, ends, sampling, end, cache_dtype)


def _decode_until(
    apply, params, state: _State, rows, ends, sampling, end, cache_dtype: Any
) -> _State:
    """Further tokens, until there are `end` of them or all rows have ended; the first of the `ends`
    after a row's own.
    """

    def more(s: _State) -> jax.Array:
        return (s.count < end) & ~s.done.all()

    def one(s: _State) -> _State:
        method = {"method": "decode"} if _encodes(apply.model) else {}
        cache = _current_cache(apply, params, rows, s, cache_dtype)
        logits, cache = apply(
            params, s.last[:, None], positions=s.position[:, None], cache=cache, **method
        )
        keys = jax.vmap(jax.random.fold_in, (0, None))(s.keys, s.count)
        token = jnp.where(s.done, ends[0], sample(logits[:, -1], sampling, keys))
        tokens = jax.lax.dynamic_update_slice_in_dim(s.tokens, token[:, None], s.count, axis=1)
        return _State(
            tokens, s.count + 1, token, s.position + 1, s.done | _is_end(token, ends), cache, s.keys
        )

    return jax.lax.while_loop(more, one, state)


def _current_cache(apply, params, rows: dict[str, Any], s: _State, cache_dtype: Any) -> Any:
    """The state's cache, made anew from the prompts' `rows` and what follows them where the newest
    token outdates it.
    """
    if (old := outdated(apply.model, s.cache)) is None:
        return s.cache
    (B, T), N = rows["tokens"].shape, s.tokens.shape[1]
    column = jnp.arange(N)[None]
    there = jnp.broadcast_to(column < s.count, (B, N))
    after = {
        "tokens": jnp.maximum(s.tokens, 0),
        "positions": rows["positions"][:, -1:] + 1 + column,
        "segment_ids": there,
    }

    def again() -> Any:
        none = jnp.zeros((B, N), jnp.int32)  # of what stands beside prompts
        parts = {name: jnp.where(there, after.get(name, none), 0) for name in rows}
        whole = {
            name: jnp.concatenate([x, parts[name].astype(x.dtype)], axis=1)
            for name, x in rows.items()
        }
        empty = apply.model.empty_cache(B, cache_slots(params) + T + N, *_kind(cache_dtype))
        made = _last_logits(apply, params, whole["tokens"], cache=empty, **_beside(whole))[1]
        # Columns to come are padding. The newest token is written once more.
        return jax.tree.map(lambda new, old: new if new.ndim else old, made, s.cache)

    return jax.lax.cond((old & ~s.done).any(), again, lambda: s.cache)


def outdated(model: Any, cache: Any) -> jax.Array | None:
    """Whether one more token makes what is cached of its row [B] wrong; None for a model of which
    that is never so.
    """
    return model.outdated(cache) if hasattr(model, "outdated") else None


def continuations(
    apply: Any,
    params: Any,
    tokens: jax.Array,
    segment_ids: jax.Array,
    key: jax.Array,
    *,
    max_tokens: int,
    eos: int | Sequence[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> jax.Array:
    """`max_tokens` sampled tokens [B, max_tokens] for prompts [B, T] that are padded on the left
    (segment 0). A row ends at any of the tokens `eos` (-1, or none: never), after which there is
    the first of them. To be traced inside a jitted function; temperature 0 is greedy.
    """
    positions = jnp.maximum(jnp.cumsum(segment_ids > 0, axis=1) - 1, 0).astype(jnp.int32)
    sampling, ends = _sampling(temperature, top_k, top_p), jnp.asarray(_ends(eos))
    keys = jax.random.split(key, tokens.shape[0])
    rows = {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": (segment_ids > 0).astype(jnp.int32),
    }
    state = _prefill(apply, params, rows, keys, ends, sampling, slots=max_tokens, cache_dtype=None)
    return _decode_until(apply, params, state, rows, ends, sampling, max_tokens, None).tokens


# Without a cache: prompts are padded on the right and the whole buffer runs for each token.


def _plain_rows(apply, params, ids, max_tokens, ends, sampling, key, stopped) -> np.ndarray:
    lengths = np.asarray([len(row) for row in ids], np.int32)
    buffer = np.zeros((len(ids), _round_up(int(lengths.max()) + max_tokens, 16)), np.int32)
    for i, row in enumerate(ids):
        buffer[i, : len(row)] = row
    keys = jax.random.split(key, len(ids))
    step = _plain_program(apply)
    done = np.zeros(len(ids), bool)
    generated = np.full((len(ids), max_tokens), ends[0], np.int32)
    for n in range(max_tokens):
        token = fetch(
            step(
                params,
                buffer,
                lengths + n - 1,
                jax.vmap(jax.random.fold_in, (0, None))(keys, n),
                sampling,
            )
        )
        token = np.where(done, ends[0], token)
        generated[:, n] = token
        buffer[np.arange(len(ids)), lengths + n] = np.maximum(token, 0)
        done |= _is_end(token, ends)
        if stopped is not None and n % _CHUNK == _CHUNK - 1:
            done |= stopped(generated[:, : n + 1])
        if done.all():
            return generated[:, : n + 1]
    return generated


@functools.lru_cache(maxsize=16)
def _plain_program(apply: Any) -> Any:
    def step(params, buffer, last, keys, sampling):
        logits = apply(params, buffer)
        return sample(
            jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0], sampling, keys
        )

    return jax.jit(step)
