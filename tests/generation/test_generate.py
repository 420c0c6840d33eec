"""Generation against the plain forward pass, and its options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import peft_jax
from peft_jax.generation.programs import continuations, decode, prefill
from peft_jax.generation.sampling import Sampling, likeliest, make_sampling, sample
from peft_jax.models.cache import CACHE_DTYPES
from peft_jax.training.evaluate import (
    bleu,
    exact_match,
    generated_metrics,
    perplexity,
    prompt_and_answer,
    rouge,
)
from tests.reference import (
    FAMILIES,
    perturb,
    random_tokens,
    relative_error,
    torch_logits,
    torch_model,
)
from tests.third_party import linen_model
from tests.training.test_loop import tiny_rows

PROMPTS = [[5, 6, 7], [9], list(range(20, 45))]


@pytest.fixture(scope="module")
def setup(tiny_folder):
    model, params = peft_jax.load(tiny_folder)
    params = perturb(peft_jax.lora(params, jax.random.key(0), rank=2))
    return model, params, peft_jax.load_tokenizer(tiny_folder), peft_jax.bind(model)


def programs_of(apply):
    """What `generate` compiled for a bound model."""
    return (
        apply.program(prefill, static_argnames=("slots", "cache_dtype")),
        apply.program(decode, donate_argnums=2, static_argnames="cache_dtype"),
    )


def greedy_by_hand(apply, params, prompt, count):
    ids, run = list(prompt), jax.jit(apply)
    for _ in range(
        count
    ):  # one length, one compilation: a causal model does not see what comes after
        logits = run(params, jnp.asarray([ids + [0] * (len(prompt) + count - len(ids))]))[0]
        ids.append(int(logits[len(ids) - 1].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_the_plain_forward_pass_for_each_row(setup):
    model, params, _, apply = setup
    out = peft_jax.generate(model, params, PROMPTS, max_tokens=40)
    for row, prompt in zip(out, PROMPTS, strict=True):
        assert row == greedy_by_hand(apply, params, prompt, 40)
    assert (
        peft_jax.generate(apply, params, [PROMPTS[1]], max_tokens=40)[0] == out[1]
    )  # company changes nothing


@pytest.mark.parametrize(("kind", "bytes_a_number"), [("int8", 1), ("fp8", 1)])
def test_a_cache_in_eight_bits_stays_close(setup, kind, bytes_a_number):
    model, params = setup[:2]
    tokens = random_tokens(2, 12)
    caches = [model.empty_cache(2, 16, dtype) for dtype in (None, CACHE_DTYPES[kind])]
    plain, quantized = (peft_jax.bind(model)(params, tokens, cache=c) for c in caches)
    assert relative_error(quantized[0], plain[0]) < (0.02 if kind == "int8" else 0.08)
    assert quantized[1].slots.keys.dtype.itemsize == bytes_a_number
    scale = quantized[1].slots.key_scales
    assert scale.shape == quantized[1].slots.keys.shape[:-1]
    assert scale.dtype == jnp.bfloat16
    prompts = [[5, 6, 7], [8, 9]]
    rows = peft_jax.generate(model, params, prompts, max_tokens=6, cache_dtype=kind)
    assert all(len(row) == 6 for row in rows)


def test_models_without_a_cache_generate_too():
    model, params = linen_model()
    out = peft_jax.generate(model, params, [[1, 2, 3], [4]], max_tokens=6)
    assert out[1] == greedy_by_hand(peft_jax.bind(model), params, [4], 6)
    assert out[0] == greedy_by_hand(peft_jax.bind(model), params, [1, 2, 3], 6)


def test_end_token_and_stop_strings(setup):
    model, params, tokenizer, _ = setup
    free = peft_jax.generate(model, params, PROMPTS[:1], max_tokens=40)[0]
    cut = peft_jax.generate(model, params, PROMPTS[:1], max_tokens=40, eos_token_id=free[10])[0]
    assert cut == free[: free.index(free[10])]
    text = peft_jax.generate(model, params, ["Hello"], tokenizer=tokenizer, max_tokens=40)[0]
    stop = text[10:14]
    assert (
        peft_jax.generate(
            model, params, ["Hello"], tokenizer=tokenizer, max_tokens=40, stop=[stop]
        )[0]
        == text[: text.index(stop)]
    )


def test_seeds_decide_samples(setup):
    model, params, *_ = setup

    def draw(seed):
        return peft_jax.generate(model, params, PROMPTS, max_tokens=12, temperature=1.0, seed=seed)

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert peft_jax.generate(
        model, params, PROMPTS, max_tokens=12, temperature=1.0, top_k=1
    ) == peft_jax.generate(model, params, PROMPTS, max_tokens=12)


def test_one_compilation_serves_all_options(setup):
    model, params, *_ = setup
    apply = peft_jax.bind(model)
    peft_jax.generate(apply, params, PROMPTS, max_tokens=8, temperature=0.7)
    begin, go_on = programs_of(apply)
    before = begin._cache_size(), go_on._cache_size()
    for options in ({"top_k": 5}, {"top_p": 0.5}, {"temperature": 2.0}, {"seed": 9}):
        peft_jax.generate(apply, params, PROMPTS, max_tokens=8, **{"temperature": 0.7, **options})
    peft_jax.generate(apply, params, [[1, 2], [3], [4]], max_tokens=20, temperature=0.7)
    assert before == (1, 1)
    assert (begin._cache_size(), go_on._cache_size()) == (
        2,
        2,
    )  # the shorter prompts are one more width


def test_sampling_draws_from_the_right_distribution():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 4000)

    def frequencies(temperature=1.0, top_k=0, top_p=1.0):
        s = Sampling(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))
        draws = np.asarray(jax.vmap(lambda k: sample(logits, s, k[None])[0])(keys))
        return np.bincount(draws, minlength=4) / len(keys)

    np.testing.assert_allclose(frequencies(), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(frequencies(top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(frequencies(top_p=0.79), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(
        frequencies(top_p=0.81), np.asarray([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03
    )
    squared = np.asarray([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(frequencies(temperature=0.5), squared / squared.sum(), atol=0.03)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_smallest_temperatures_are_greedy(top_p):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(8, 50)) * 30 + 100, jnp.float32)
    keys = jax.random.split(jax.random.key(0), 8)
    for temperature in (1e-3, 1e-38, 1e-46, 1e-300):
        assert (
            sample(logits, make_sampling(temperature, 0, top_p), keys).tolist()
            == logits.argmax(-1).tolist()
        )


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there are no prompts"),
        ([[1], []], {}, "prompt 1 is empty"),
        (["text"], {}, "need the tokenizer"),
        ([[1]], {"temperature": -1}, "temperature >= 0"),
        ([[1]], {"top_p": 0}, "0 < top_p <= 1"),
        ([[1]], {"max_tokens": 0}, "max_tokens >= 1"),
    ],
)
def test_impossible_requests(setup, prompts, options, message):
    model, params, *_ = setup
    with pytest.raises(ValueError, match=message):
        peft_jax.generate(model, params, prompts, **options)


def test_metrics_of_generated_text():
    assert exact_match(["a ", "b"], [["x", "a"], ["c"]]) == 0.5
    same = ["the cat sat on the mat today", "a dog ran far away"]
    assert bleu(same, [[s] for s in same]) == pytest.approx(100)
    assert bleu(same, [["nothing like it at all here"]] * 2) < 10
    assert bleu([same[0]], [["completely other words here", same[0]]]) == pytest.approx(100)
    assert rouge(["the cat"], [["the cat"]]) == 1.0
    assert rouge(["the cat"], [["a dog", "the cat sat"]]) == pytest.approx(0.8)


def test_generated_metrics_group_references(setup):
    model, params, tokenizer, _ = setup
    from peft_jax.data import Record

    prompts = ["What?", "Who?", "Where is it?", "The"]
    answers = peft_jax.generate(model, params, prompts, tokenizer=tokenizer, max_tokens=5)
    prompt, answer = next(
        p
        for p in zip(prompts, answers, strict=True)
        if any(w.isascii() and w.isalnum() for w in p[1].split())
    )
    records = [Record({"prompt": prompt, "completion": c}, "x") for c in ("other", answer)]
    scores = generated_metrics(
        model, params, records, tokenizer, ["exact_match", "rouge"], max_tokens=5, batch_size=2
    )
    assert scores == {"exact_match": 1.0, "rouge": pytest.approx(1.0)}
    chat = Record(
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        "x",
    )
    prompt, answer = prompt_and_answer(chat, tokenizer)
    assert tokenizer.decode(prompt) == "<s>### User:\nHi\n\n### Assistant:\n"
    assert answer == "Ho"


def test_perplexity_is_the_exponential_of_the_loss(setup):
    model, params, *_ = setup
    rows = tiny_rows(10, 16)
    one, two = (perplexity(model, params, rows, batch_size=n) for n in (4, 10))
    assert one["perplexity"] == pytest.approx(np.exp(one["loss"]))
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)  # padding rows weigh nothing


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(3, 1.0), (0, 0.8), (5, 0.6), (1, 1.0), (64, 1.0), (200, 0.9999)]
)
def test_filters_keep_what_a_plain_one_keeps(top_k, top_p):
    """Over 1,000 rows of a vocabulary of 64, against sets built in NumPy, row by row, in
    float64.
    """
    logits = np.random.default_rng(0).normal(size=(1000, 64)).astype(np.float32) * 4
    sampling = Sampling(jnp.float32(1.0), jnp.int32(top_k), jnp.float32(top_p))
    kept = np.asarray(likeliest(sampling, jnp.asarray(logits)) > -np.inf)
    for row, mine in zip(logits.astype(np.float64), kept, strict=True):
        order = np.argsort(-row)[: top_k or None]
        p = np.exp(row[order] - row[order].max())
        p /= p.sum()
        before = np.cumsum(p) - p
        expected = order if top_p >= 1 else order[before < top_p]
        if np.abs(before - top_p).min() > 1e-5:
            assert set(np.flatnonzero(mine)) == set(expected)


@pytest.mark.parametrize(
    ("family", "sizes", "cached"),
    [
        ("phi3_longrope", (20, 16, 3, 12), True),
        ("llama_dynamic", (20, 3, 12), False),
    ],  # its own cache goes stale there
)
def test_what_is_cached_follows_a_rotation_by_length(family, sizes, cached, tmp_path):
    """Against transformers, each row alone: beyond, at, below and across the length (16) where all
    positions turn anew.
    """
    reference = torch_model(FAMILIES[family]())
    reference.save_pretrained(tmp_path)
    model, params = peft_jax.load(tmp_path)
    prompts = [random_tokens(1, n, seed=2 if n == 20 else n)[0].tolist() for n in sizes]
    rows = peft_jax.generate(model, params, prompts, max_tokens=12, eos_token_id=[])
    for prompt, row in zip(prompts, rows, strict=True):
        ids, more = (
            torch.tensor([prompt]),
            {"use_cache": cached, "do_sample": False, "eos_token_id": None},
        )
        assert row == reference.generate(ids, max_new_tokens=12, **more)[0, len(prompt) :].tolist()


def test_sampled_continuations_follow_a_rotation_by_length(tmp_path):
    """As on-policy distillation traces them, across the length."""
    torch_model(FAMILIES["phi3_longrope"]()).save_pretrained(tmp_path)
    model, params = peft_jax.load(tmp_path)
    apply, prompts = peft_jax.bind(model), random_tokens(2, 12, seed=12)
    expected = peft_jax.generate(apply, params, prompts.tolist(), max_tokens=12, eos_token_id=[])
    write = jax.jit(
        lambda params, key: continuations(
            apply,
            params,
            jnp.asarray(prompts),
            jnp.ones((2, 12), jnp.int32),
            key,
            max_tokens=12,
            eos=(),
            temperature=0.0,
        )
    )
    assert write(params, jax.random.key(0)).tolist() == expected


@pytest.mark.parametrize("family", ["phi3_longrope", "llama_dynamic"])
def test_a_packed_sequence_turns_by_its_own_length(family, tmp_path):
    reference = torch_model(FAMILIES[family]())
    reference.save_pretrained(tmp_path)
    model, params = peft_jax.load(tmp_path)
    tokens, sizes = random_tokens(1, 30), (10, 20)
    positions = np.concatenate([np.arange(n) for n in sizes])[None]
    segments = np.repeat((7, 1000), sizes)[None]
    out = jax.jit(peft_jax.bind(model))(params, tokens, positions=positions, segment_ids=segments)
    assert relative_error(out[:, :10], torch_logits(reference, tokens[:, :10])) < 2e-5
    assert relative_error(out[:, 10:], torch_logits(reference, tokens[:, 10:])) < 2e-5


def test_a_prefill_makes_the_last_tokens_logits_alone(setup):
    """No array of the compiled program holds logits of all the prompt's positions."""
    model, params, *_ = setup
    apply = peft_jax.bind(model)
    rows = {n: jnp.ones((2, 16), jnp.int32) for n in ("tokens", "segment_ids")}
    rows["positions"] = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (2, 16))
    begin, _ = programs_of(apply)
    keys = jax.random.split(jax.random.key(0), 2)
    text = begin.lower(
        apply, params, rows, keys, jnp.asarray([-1]), None, slots=32, cache_dtype=None
    ).as_text()
    vocabulary = model.config.vocab_size
    assert f"tensor<2x1x{vocabulary}xf32>" in text
    assert f"2x16x{vocabulary}x" not in text


@pytest.mark.parametrize("family", ["llama2", "gpt2"])
def test_a_full_cache_is_no_place_to_write(family, tmp_path):
    torch_model(FAMILIES[family]()).save_pretrained(tmp_path)
    model, params = peft_jax.load(tmp_path)
    apply = peft_jax.bind(model)
    tokens = random_tokens(2, 6)
    _, cache = apply(params, tokens, cache=model.empty_cache(2, 8))
    with pytest.raises(
        ValueError, match="3 tokens from slot 6 on find no room in a cache of 8 slots"
    ):
        apply(params, tokens[:, :3], cache=cache)
    inside = jax.jit(
        lambda cache, n: apply(params, tokens[:, :n], cache=cache)[0], static_argnums=1
    )
    assert np.isfinite(inside(cache, 2)).all()
    assert np.isnan(inside(cache, 3)).all()


@pytest.mark.parametrize("family", ["llama3_tied_biased", "gemma2_caps", "gpt2"])
def test_a_prompt_looks_at_its_own_tokens_alone(family, tmp_path):
    """In an empty cache, and not at all of its slots; keys, values and logits are those of a cache
    that nothing is known of.
    """
    T, S = 40, 72
    torch_model(FAMILIES[family]()).save_pretrained(tmp_path)
    model, params = peft_jax.load(tmp_path)
    apply = peft_jax.bind(model)
    segments = np.ones((2, T), np.int32)
    segments[1, :7] = 0
    positions = np.maximum(np.cumsum(segments, 1) - 1, 0).astype(np.int32)
    rows = {"tokens": random_tokens(2, T), "positions": positions, "segment_ids": segments}

    def known(params):
        return apply(params, **rows, cache=model.empty_cache(2, S))

    logits, cache = jax.jit(known)(params)
    expected, old = jax.jit(lambda params, cache: apply(params, **rows, cache=cache))(
        params, model.empty_cache(2, S).replace(empty=False)
    )
    seen = segments[..., None] > 0
    assert relative_error(logits * seen, expected * seen) < 1e-6
    for name in ("keys", "values"):
        ours, theirs = (getattr(c.slots, name)[:, :, :T] for c in (cache, old))
        assert relative_error(ours * seen[..., None], theirs * seen[..., None]) < 1e-6
    assert int(cache.index) == T
    assert f"{T},{S}]" not in str(jax.make_jaxpr(known)(params))
    step = {"tokens": random_tokens(2, 1, seed=1), "positions": positions[:, -1:] + 1}
    after, before = (jax.jit(apply)(params, **step, cache=c)[0] for c in (cache, old))
    assert relative_error(after, before) < 1e-6
