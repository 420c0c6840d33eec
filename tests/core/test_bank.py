"""A bank of adapters: each row as if its adapter were alone, without compiling again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax
from peft_jax.adapters import (
    adaption_prompt,
    bottleneck,
    compacter,
    ia3,
    prefix_tuning,
    prompt_tuning,
    reft,
)
from peft_jax.core import (
    bank,
    bank_adapter,
    clear_adapter,
    layout_of,
    places,
    run_parallel,
    select,
    set_adapter,
)
from peft_jax.low_rank import dora
from peft_jax.methods import METHODS
from tests.reference import family_checkpoint, perturb, random_tokens, relative_error
from tests.third_party import VOCAB, linen_model, nnx_model

SIZE, ROWS = 4, 6
IDS = jnp.asarray([2, 0, -1, 3, 0, 2], jnp.int32)
TARGETS = ["embed_tokens", "q_proj", "down_proj", "lm_head"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder, _, _ = family_checkpoint("llama2", tmp_path_factory.mktemp("base"))
    model, params = peft_jax.load(folder)
    tokens = random_tokens(ROWS, 9)
    trees = [
        perturb(
            peft_jax.lora(params, jax.random.key(i), rank=1 + i, alpha=3.0, targets=TARGETS), seed=i
        )
        for i in range(SIZE)
    ]
    banked = bank(peft_jax.lora(params, jax.random.key(9), rank=SIZE, targets=TARGETS), SIZE)
    for i, tree in enumerate(trees):
        banked = set_adapter(banked, i, tree)
    return model, params, trees, banked, tokens


def test_each_row_equals_its_adapter_alone(setting):
    model, params, trees, banked, tokens = setting
    apply = jax.jit(peft_jax.bind(model))
    out = apply(banked, tokens, adapter_ids=IDS)
    for row, i in enumerate(IDS.tolist()):
        alone = apply(params if i < 0 else trees[i], tokens[row : row + 1])
        assert relative_error(out[row : row + 1], alone) < 1e-5
    taken = bank_adapter(banked, 2)
    assert relative_error(apply(taken, tokens), apply(trees[2], tokens)) < 1e-5


def test_replacing_an_adapter_compiles_nothing(setting):
    model, params, trees, banked, tokens = setting
    apply = jax.jit(peft_jax.bind(model))
    apply(banked, tokens, adapter_ids=IDS)
    other = clear_adapter(set_adapter(banked, 0, trees[1]), 2)
    out = apply(other, tokens, adapter_ids=IDS[::-1])
    assert apply._cache_size() == 1
    assert (
        relative_error(out[1:2], jax.jit(peft_jax.bind(model))(trees[1], tokens[1:2])) < 1e-5
    )  # was 0, now the other
    assert (
        relative_error(out[0:1], jax.jit(peft_jax.bind(model))(params, tokens[0:1])) < 1e-5
    )  # was cleared


def test_generation_with_a_bank(setting):
    model, params, trees, banked, tokens = setting
    prompts = tokens[:, :4].tolist()
    out = peft_jax.generate(model, banked, prompts, max_tokens=6, adapter_ids=IDS.tolist())
    for row, i in enumerate(IDS.tolist()):
        assert (
            out[row]
            == peft_jax.generate(
                model, params if i < 0 else trees[i], [prompts[row]], max_tokens=6
            )[0]
        )
    with pytest.raises(ValueError, match="2 adapter_ids for 6 prompts"):
        peft_jax.generate(model, banked, prompts, adapter_ids=[0, 1])


def test_a_step_trains_the_adapters_of_its_rows_alone(setting):
    from peft_jax.objectives.tokens import next_token

    model, _, _, banked, tokens = setting
    apply = peft_jax.bind(model)
    trainable, frozen = peft_jax.partition(banked)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((ROWS, 8)),
        "adapter_ids": IDS,
    }
    grads = jax.jit(
        jax.grad(lambda t: next_token(apply, peft_jax.combine(t, frozen), batch, None)[0])
    )(trainable)
    path = "model/layers/self_attn/q_proj/kernel"
    size = jnp.abs(places(grads)[path].adapters.b).max((0, 2, 3))
    np.testing.assert_array_equal(size > 0, [True, False, True, True])


@pytest.mark.parametrize("make", [linen_model, nnx_model])
def test_in_models_that_know_nothing_of_it(make):
    model, params = make()
    tokens = random_tokens(3, 8, vocab=VOCAB)
    layout = layout_of(model, tokens)
    targets = [p for p in select(params) if "conv" not in p]
    lora = perturb(peft_jax.lora(params, jax.random.key(0), rank=2, targets=targets, layout=layout))
    banked = bank(lora, 2)
    banked = set_adapter(banked, 1, lora)
    apply = jax.jit(peft_jax.bind(model))
    out = apply(banked, tokens, adapter_ids=jnp.asarray([1, -1, 1]))
    assert relative_error(out[jnp.asarray([0, 2])], apply(lora, tokens)[jnp.asarray([0, 2])]) < 1e-5
    assert relative_error(out[1], apply(params, tokens)[1]) < 1e-5


def test_bad_requests_are_refused_by_name(setting):
    model, params, trees, banked, tokens = setting
    with pytest.raises(ValueError, match="needs apply"):
        peft_jax.bind(model)(banked, tokens)
    with pytest.raises(ValueError, match="index must lie between 0 and 3, got 4"):
        set_adapter(banked, 4, trees[0])
    wide = peft_jax.lora(params, jax.random.key(0), rank=9, targets="q_proj")
    with pytest.raises(
        ValueError,
        match=r"an array \(3, 32, 9\) at model/layers/self_attn/q_proj/kernel, the bank .*resize",
    ):
        set_adapter(banked, 0, wide)
    other = peft_jax.lora(params, jax.random.key(0), rank=2, targets="k_proj")
    with pytest.raises(ValueError, match="k_proj/kernel, which the bank lacks"):
        set_adapter(banked, 0, other)
    with pytest.raises(ValueError, match="no adapter named 'other'"):
        set_adapter(banked, 0, trees[0], adapter="other")
    with pytest.raises(ValueError, match="is no one weight"):
        peft_jax.merge(banked)


KINDS = {
    "lora": lambda p, k: peft_jax.lora(p, k, rank=2),
    "dora": lambda p, k: dora(p, k, rank=2, targets=["q_proj", "down_proj"]),
    "ia3": lambda p, k: ia3(p, k),
    "bottleneck": lambda p, k: bottleneck(
        p, k, size=3, init="bert", gating="token", ln_before=True
    ),
    "reft": lambda p, k: reft(p, k, rank=2, first=2),
    "prefix": lambda p, k: prefix_tuning(p, k, num_virtual_tokens=3),
    "prompt": lambda p, k: prompt_tuning(p, k, num_virtual_tokens=3),
    "adaption": lambda p, k: adaption_prompt(p, k, adapter_len=3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_banks_of_every_kind(setting, kind):
    """Each row as alone, an adapter replaced without compiling, one taken out, rows generated."""
    model, params, _, _, tokens = setting
    trees = [perturb(KINDS[kind](params, jax.random.key(i)), seed=i, scale=0.3) for i in range(3)]
    banked = bank(trees[0], 3)
    for i in (1, 2):
        banked = set_adapter(banked, i, trees[i])
    apply = jax.jit(peft_jax.bind(model))
    ids = jnp.asarray([2, 0, -1, 1, 0, 2], jnp.int32)
    out = apply(banked, tokens, adapter_ids=ids)
    for row, i in enumerate(ids.tolist()):
        assert (
            relative_error(
                out[row : row + 1], apply(params if i < 0 else trees[i], tokens[row : row + 1])
            )
            < 1e-5
        )
    compiled = apply._cache_size()
    swapped = apply(set_adapter(banked, 0, trees[2]), tokens, adapter_ids=ids)
    assert apply._cache_size() == compiled
    assert relative_error(swapped[1:2], apply(trees[2], tokens[1:2])) < 1e-5
    taken = bank_adapter(banked, 1)
    assert relative_error(apply(taken, tokens), apply(trees[1], tokens)) < 1e-5
    prompts = tokens[:2, :4].tolist()
    generated = peft_jax.generate(model, banked, prompts, max_tokens=3, adapter_ids=[1, 2])
    assert generated == [
        peft_jax.generate(model, trees[i + 1], [p], max_tokens=3)[0] for i, p in enumerate(prompts)
    ]


def test_the_same_rows_through_several_adapters(setting):
    model, _, trees, banked, tokens = setting
    apply = jax.jit(peft_jax.bind(model))
    out = run_parallel(apply, banked, tokens, [3, 1])
    assert out.shape[:2] == (2, ROWS)
    assert relative_error(out[1], apply(trees[1], tokens)) < 1e-5


def test_what_a_bank_cannot_hold_is_refused(setting):
    _, params, _, _, _ = setting
    shared = compacter(params, jax.random.key(0), size=4, dimension=2)
    with pytest.raises(ValueError, match="shares arrays with other places"):
        bank(shared, 2)
    with pytest.raises(ValueError, match="size must be at least 1"):
        bank(shared, 0)
    with pytest.raises(ValueError, match="no adapter named 'x'"):
        bank(shared, 2, adapter="x")
    narrow = bank(bottleneck(params, jax.random.key(0), size=3), 2)
    wide = bottleneck(params, jax.random.key(0), size=5)
    with pytest.raises(ValueError, match="resize it first"):
        set_adapter(narrow, 0, wide)
    with pytest.raises(ValueError, match="activation='tanh', the bank 'swish'"):
        set_adapter(narrow, 0, bottleneck(params, jax.random.key(0), size=3, activation="tanh"))
    with pytest.raises(ValueError, match="other arrays than the bank's"):
        set_adapter(narrow, 0, bottleneck(params, jax.random.key(0), size=3, bias=False))
    prefix = bank(prefix_tuning(params, jax.random.key(0), num_virtual_tokens=4), 2)
    with pytest.raises(ValueError, match="length=2, the bank 4"):
        set_adapter(prefix, 0, prefix_tuning(params, jax.random.key(0), num_virtual_tokens=2))


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_adapters_in_a_bank_drop_out_in_training(setting, method):
    """Rows that use one adapter draw masks of their own; over many draws the mean is what
    evaluation gives.
    """
    model, params, _, _, tokens = setting
    where = {"targets": ["q_proj", "down_proj"], "init": "gaussian"} if method == "lora" else {}
    one = perturb(METHODS[method](params, jax.random.key(0), dropout=0.5, **where), seed=0)
    apply = jax.jit(peft_jax.bind(model))
    banked = bank(one, 2)
    twice = jnp.concatenate([tokens[:1], tokens[:1]])
    ids = jnp.asarray([1, 1])
    plain = apply(banked, twice, adapter_ids=ids)
    assert relative_error(plain[0], plain[1]) < 1e-6
    dropped = apply(banked, twice, adapter_ids=ids, rng=jax.random.key(1))
    assert relative_error(dropped[0], dropped[1]) > 1e-4
    assert relative_error(dropped, plain) > 1e-4
    base = apply(banked, twice, adapter_ids=jnp.asarray([-1, -1]), rng=jax.random.key(1))
    assert relative_error(base, apply(params, twice)) < 1e-5


def test_adapter_drop_reaches_a_bank(setting):
    model, params, _, _, tokens = setting
    one = perturb(bottleneck(params, jax.random.key(0), drop_layers=3), seed=0)
    apply = jax.jit(peft_jax.bind(model))
    banked, ids = bank(one, 2), jnp.zeros(ROWS, jnp.int32)
    for seed in range(3):
        key = jax.random.key(seed)
        assert (
            relative_error(
                apply(banked, tokens, adapter_ids=ids, rng=key), apply(one, tokens, rng=key)
            )
            < 1e-5
        )
