"""Calibrated methods where calibration reaches 2 of 8 experts, and one of two dense weights: what
is known is used as before, elsewhere the method that needs no data is taken, and that is said.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax
from peft_jax.core import gradients, output_errors
from peft_jax.core.calibrate import calibrate_all
from peft_jax.core.coverage import Calibrated, ledger
from peft_jax.core.weight import materialize, matmul, ragged_matmul
from peft_jax.low_rank import factorize
from peft_jax.pruning import allocate_sparsity, prune_in_turn
from peft_jax.pruning.importance import importance
from peft_jax.quantization import NF4, Int, allocate_bits, quantize_in_turn
from tests.reference import family_checkpoint, random_tokens

E, SEEN, IN, OUT, TOKENS = 8, 2, 32, 16, 48
EXPERTS, USED, IDLE = "experts/gate_up_proj", "used/kernel", "idle/kernel"
TABLE = jax.random.normal(jax.random.key(5), (TOKENS, IN)) * jnp.exp(
    jax.random.normal(jax.random.key(6), (IN,))
)


def apply(params, tokens):
    """A layer that all tokens go through, and experts of which the first gets the tokens below 16
    and the second the rest.
    """
    x = TABLE[tokens.reshape(-1)]
    y = x + jnp.pad(matmul(x, params["used"]["kernel"]), ((0, 0), (0, IN - OUT)))
    sizes = jnp.zeros(E, jnp.int32).at[0].set((tokens < 16).sum()).at[1].set((tokens >= 16).sum())
    return ragged_matmul(y, params["experts"]["gate_up_proj"], sizes)


@pytest.fixture(scope="module")
def params():
    def draw(seed, *shape):
        return jax.random.normal(jax.random.key(seed), shape)

    return {
        "experts": {"gate_up_proj": draw(0, E, IN, OUT)},
        "used": {"kernel": draw(1, IN, OUT)},
        "idle": {"kernel": draw(2, IN, OUT)},
    }


@pytest.fixture(scope="module")
def statistics(params):
    batches = [{"tokens": jnp.arange(24)[None]}, {"tokens": jnp.arange(24, TOKENS)[None]}]
    found = calibrate_all(
        apply, params, batches, ["covariance", "second_moment", "mean_abs", "max_abs"]
    )

    def loss(p, batch):
        return (apply(p, batch["tokens"]) ** 2).mean()

    for name in ("gradient", "squared_gradient"):
        values = gradients(loss, params, batches, square=name.startswith("squared"))
        found[name] = Calibrated(values, found["covariance"].tokens)
    return found


def filled(statistics):
    """The statistics as if all were known: those that are not have another's values."""

    def fill(path, a):
        return jnp.concatenate([a[:SEEN], jnp.tile(a[:1], (E - SEEN, *[1] * (a.ndim - 1)))])

    every = {}
    for name, of in statistics.items():
        values = {EXPERTS: fill(EXPERTS, of[EXPERTS]), USED: of[USED], IDLE: of[USED]}
        every[name] = Calibrated(values, dict.fromkeys(values, jnp.float32(TOKENS)))
    return every


def matrices(tree):
    places = peft_jax.core.places(tree)
    return {path: np.asarray(materialize(places[path])) for path in (EXPERTS, USED, IDLE)}


def quantized(rounding, format=Int(bits=3, block_size=8), **options):  # noqa: B008 - immutable
    def run(p, s, rounding=rounding, **o):
        return matrices(peft_jax.quantize(p, format, rounding=rounding, statistics=s, **o))

    return (
        lambda p, s: run(p, s, **options),
        lambda p: run(p, None, "nearest"),
        f"rounding '{rounding}'",
        "'nearest'",
    )


def pruned(score, compare="matrix", **options):
    share = None if "pattern" in options else 0.5

    def run(p, s, score):
        return matrices(
            peft_jax.prune(p, share, score=score, compare=compare, statistics=s, **options)
        )

    return (
        lambda p, s: run(p, s, score),
        lambda p: run(p, None, "magnitude"),
        f"score '{score}'",
        "'magnitude'",
    )


def factorized(whitening, name):
    def run(p, s):
        return matrices(factorize(p, keep=0.5, statistics=s, whitening=whitening)[0])

    return lambda p, s: run(p, s["covariance"]), lambda p: run(p, None), name, "plain SVD"


def adapted(init, statistic="covariance"):
    def run(p, s, init):
        places = peft_jax.core.places(
            peft_jax.lora(p, jax.random.key(7), rank=2, init=init, statistics=s)
        )

        def factors(w):
            return np.concatenate([np.asarray(w.a), np.asarray(w.b).swapaxes(-1, -2)], -2)

        return {path: factors(places[path]) for path in (EXPERTS, USED, IDLE)}

    return (
        lambda p, s: run(p, s[statistic], init),
        lambda p: run(p, None, "kaiming"),
        f"init '{init}'",
        "'kaiming'",
    )


METHODS = {
    "gptq": quantized("gptq"),
    "gptq_nf4": quantized("gptq", NF4(block_size=8, double=False)),
    "gptq_order": quantized("gptq", activation_order="dynamic"),
    "awq": quantized("awq", Int(bits=4, block_size=8, symmetric=False)),
    "smoothquant": quantized("smoothquant", Int(bits=8)),
    "wanda": pruned("wanda", "output"),
    "wanda_nm": pruned("wanda", "output", pattern="2:4"),
    "ria": pruned("ria"),
    "sparsegpt": pruned("sparsegpt"),
    "sparsegpt_nm": pruned("sparsegpt", pattern="2:4"),
    "snip": pruned("snip"),
    "taylor": pruned("taylor"),
    "movement": pruned("movement"),
    "svd_llm": factorized("root", "SVD-LLM"),
    "asvd": factorized("scale", "ASVD"),
    "eva": adapted("eva"),
    "corda_kpm": adapted("corda_kpm"),
    "corda_ipm": adapted("corda_ipm"),
    "lora_ga": adapted("lora_ga", "gradient"),
}


def test_tokens_are_counted_for_each_expert_and_weight(statistics):
    for of in statistics.values():
        np.testing.assert_array_equal(of.tokens[EXPERTS], [16, 32, 0, 0, 0, 0, 0, 0])
        assert (of.tokens[USED], of.tokens[IDLE]) == (TOKENS, 0)


@pytest.mark.parametrize("name", METHODS)
def test_what_calibration_does_not_reach_takes_what_needs_no_data(name, params, statistics, caplog):
    calibrated, plain, method, instead = METHODS[name]
    before, without = calibrated(params, filled(statistics)), plain(params)
    assert not [r for r in caplog.records if "usable statistics" in r.message]
    found = calibrated(params, statistics)
    (line,) = [r.getMessage() for r in caplog.records if "usable statistics" in r.message]
    assert line.startswith(f"{method} has no usable statistics of 7 of 10 matrices")
    assert f"take {instead} instead" in line
    assert f"the first is {EXPERTS}[2]" in line
    np.testing.assert_array_equal(found[EXPERTS][:SEEN], before[EXPERTS][:SEEN])
    np.testing.assert_array_equal(found[USED], before[USED])
    for path, part in ((EXPERTS, slice(SEEN, None)), (IDLE, ...)):
        np.testing.assert_allclose(found[path][part], without[path][part], atol=1e-4)
        assert (
            np.abs(found[path][part] - before[path][part]).max() > 1e-3
        )  # or this would be no test


def test_statistics_that_are_not_finite_are_none(params, statistics):
    of = statistics["covariance"]
    broken = Calibrated({**of, EXPERTS: of[EXPERTS].at[0].set(jnp.nan)}, of.tokens)
    run, plain, *_ = METHODS["gptq"]
    np.testing.assert_array_equal(
        run(params, {"covariance": broken})[EXPERTS][0], plain(params)[EXPERTS][0]
    )


def test_eva_needs_as_many_tokens_as_its_rank(params, statistics):
    of = statistics["covariance"]
    few = Calibrated(of, {**of.tokens, USED: jnp.float32(1)})
    run, plain, *_ = METHODS["eva"]
    np.testing.assert_array_equal(run(params, {"covariance": few})[USED], plain(params)[USED])


def test_budgets_weigh_what_calibration_does_not_reach_by_its_own_error(params, statistics, caplog):
    formats = [Int(bits=2, block_size=8), Int(bits=8, block_size=8)]
    where = {"bits": 9.0, "targets": ["used", "idle"]}
    chosen = allocate_bits(
        {**params, "idle": {"kernel": params["idle"]["kernel"] * 1e-3}},
        formats,
        statistics=statistics["covariance"],
        **where,
    )
    # The error is relative, so the small weight matters as the other does; one of the two gets 8
    # bits.
    assert sorted(f.bits for f in chosen.values()) == [2, 8]
    assert "the budget of bits has no usable statistics of 1 of 2 matrices" in caplog.text
    shares = allocate_sparsity(params, 0.5, "global", score="wanda", statistics=statistics)
    assert (shares[EXPERTS][SEEN:] == 0.5).all()
    assert shares[IDLE] == 0.5
    assert not (shares[EXPERTS][:SEEN] == 0.5).any()
    sizes = {
        **statistics["second_moment"],
        IDLE: jnp.ones(IN),
        EXPERTS: statistics["second_moment"][EXPERTS].at[SEEN:].set(1),
    }
    owl = [
        allocate_sparsity(params, 0.5, "owl", statistics=s)
        for s in (statistics, {"second_moment": sizes})
    ]
    for path in (EXPERTS, USED, IDLE):
        np.testing.assert_array_equal(owl[0][path], owl[1][path])


def test_static_activations_that_are_not_known_are_scaled_for_each_token(
    params, statistics, caplog
):
    def run(kind, s):
        return peft_jax.quantize(
            params, Int(bits=8, activations=kind), targets=["used", "idle"], statistics=s
        )

    static, dynamic = run("static", statistics), run("dynamic", None)
    assert "static activations has no usable statistics of 1 of 2 matrices" in caplog.text

    def product(tree, name):
        return matmul(TABLE, tree[name]["kernel"])

    np.testing.assert_array_equal(product(static, "idle"), product(dynamic, "idle"))
    assert (product(static, "used") != product(dynamic, "used")).any()


def test_methods_that_go_block_by_block_say_it_once(params, caplog):
    batches = [{"tokens": jnp.arange(TOKENS)[None]}]
    layers = {f"layers_{i}": params for i in range(2)}

    def both(p, tokens):
        return apply(p["layers_0"], tokens) + apply(p["layers_1"], tokens)

    with ledger() as book:
        quantize_in_turn(both, layers, batches, Int(bits=4, block_size=8), rounding="gptq")
        assert not caplog.records
    (record,) = caplog.records
    assert "14 of 20 matrices" in record.getMessage()
    assert set(book.tokens) == {
        f"layers_{i}/{path}" for i in range(2) for path in (EXPERTS, USED, IDLE)
    }
    caplog.clear()
    prune_in_turn(both, layers, batches, 0.5, score="wanda")
    assert len(caplog.records) == 1
    errors = output_errors(both, layers, layers, batches)
    np.testing.assert_array_equal(np.isnan(errors[f"layers_0/{EXPERTS}"]), np.arange(E) >= SEEN)


def test_heads_and_units_of_layers_without_inputs_are_ranked_by_magnitude(tmp_path, caplog):
    model, params = peft_jax.load(family_checkpoint("llama2", tmp_path)[0])
    layers = params["model"]["layers"]
    value = layers["self_attn"]["v_proj"]
    silent = {
        **layers,
        "self_attn": {
            **layers["self_attn"],
            "v_proj": {**value, "kernel": value["kernel"].at[1].set(0.0)},
        },
    }
    params = {**params, "model": {**params["model"], "layers": silent}}
    batches = [{"tokens": random_tokens(2, 8)}]
    found, plain = (
        importance(model, params, batches, score=s) for s in ("activation", "magnitude")
    )
    np.testing.assert_array_equal(found["heads"][1], plain["heads"][1])
    assert (found["heads"][0] != plain["heads"][0]).all()
    assert (found["units"] != plain["units"]).all()
    assert "importance 'activation' has no usable statistics" in caplog.text
