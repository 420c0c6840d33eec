"""What a bound model keeps: its state is read at each call, and nothing outlives it."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import peft_jax
from peft_jax.core import calibrate, nnx_params
from peft_jax.core.bind import Bound, bound_of
from peft_jax.core.capture import capture, output_of
from peft_jax.data import Rows
from peft_jax.generation.programs import next_tokens
from peft_jax.knowledge.evaluation import _by_rows, answer_nll
from peft_jax.knowledge.requests import EditRows
from peft_jax.objectives.tokens import next_token
from peft_jax.training.evaluate import perplexity
from tests.third_party import VOCAB, WIDTH, ShiftedModel, VisionModel, linen_model

TOKENS = np.arange(12).reshape(2, 6)
TARGETS = TOKENS[:, ::-1]
ONES = np.ones(TOKENS.shape, np.int32)


def shifted():
    """(model, params, what the model makes of TOKENS by NumPy: hidden states and logits)."""
    model = ShiftedModel(nnx.Rngs(0))
    w = jax.tree.map(np.asarray, nnx_params(model))

    def expected(shift):
        hidden = w["embed"]["embedding"][TOKENS] + np.asarray(shift)
        return hidden, hidden @ w["head"]["kernel"] + w["head"]["bias"]

    return model, nnx_params(model), expected


def nll_of(logits):
    """[2, 6] of TARGETS, by NumPy in float64."""
    logits = logits.astype(np.float64)
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, TARGETS[..., None], -1)[..., 0]


def run_bound(apply, params, tokens):
    return apply(params, tokens)


def called(model, apply, params):
    return apply(params, TOKENS)


def in_a_program(model, apply, params):
    return apply.program(run_bound)(apply, params, TOKENS)


def captured(model, apply, params):
    return capture(apply, {"logits": output_of("head")})(params, TOKENS)[1]["logits"]


def calibrated(model, apply, params):
    options = {"statistic": "mean", "targets": ["head/kernel"]}
    return calibrate(apply, params, [{"tokens": TOKENS}], **options)["head/kernel"]


def answered(model, apply, params):
    rows = EditRows(TOKENS, TARGETS, np.ones(TOKENS.shape, np.float32), ONES, ONES[:, 0])
    return _by_rows(answer_nll, apply, params, rows, 2)


def evaluated(model, apply, params):
    rows = Rows(TOKENS, TARGETS, np.ones(TOKENS.shape, np.float32), 0 * TOKENS, ONES)
    return perplexity(model, params, rows, batch_size=2)["loss"]


def generated(given):
    def run(model, apply, params):
        prompts = TOKENS.tolist()
        options = {"max_tokens": 1, "eos_token_id": []}
        return np.asarray(peft_jax.generate((model, apply)[given], params, prompts, **options))

    return run


USES = {
    "call": (called, lambda hidden, logits: logits),
    "program": (in_a_program, lambda hidden, logits: logits),
    "capture": (captured, lambda hidden, logits: logits),
    "calibrate": (calibrated, lambda hidden, logits: hidden.mean((0, 1))),
    "answers": (answered, lambda hidden, logits: nll_of(logits).mean(-1)),
    "perplexity": (evaluated, lambda hidden, logits: nll_of(logits).mean()),
    "generate_model": (generated(0), lambda hidden, logits: logits[:, -1:].argmax(-1)),
    "generate_bound": (generated(1), lambda hidden, logits: logits[:, -1:].argmax(-1)),
}


@pytest.mark.parametrize("name", USES)
def test_what_changed_after_the_first_call_counts_in_the_next(name):
    """A shift that an NNX model holds beside its parameters, changed between calls of one bound
    model, against NumPy; and once all is forgotten, the model and what was compiled are gone.
    """
    use, of = USES[name]
    model, params, expected = shifted()
    apply, before = peft_jax.bind(model), None
    for seed in range(3):
        shift = 4.0 * np.random.default_rng(seed).normal(size=WIDTH).astype(np.float32)
        model.shift[...] = jnp.asarray(shift)
        found = np.asarray(use(model, apply, params))
        np.testing.assert_allclose(found, of(*expected(shift)), rtol=1e-4, atol=1e-4)
        assert before is None or np.abs(found - before).max() > 0.1
        before = found
    gone = [weakref.ref(x) for x in (model, apply, *apply.programs.values())]
    del model, apply
    gc.collect()
    assert not any(ref() for ref in gone)


def test_a_mode_that_changed_counts_too():
    model, params, expected = shifted()
    apply = peft_jax.bind(model)
    run = apply.program(run_bound)
    still = run(apply, params, TOKENS)
    model.train()
    assert np.abs(run(apply, params, TOKENS) - still).max() > 0.1
    model.eval()
    np.testing.assert_array_equal(run(apply, params, TOKENS), still)
    assert run._cache_size() == 2


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_model_finds_its_programs_again_and_takes_them_with_it(kind):
    model, params = linen_model() if kind == "linen" else shifted()[:2]
    for _ in range(2):
        peft_jax.generate(model, params, [[1, 2, 3]], max_tokens=2)
        if kind == "nnx":
            model.shift[...] += 1.0
    program = bound_of(model).program(next_tokens)
    assert program._cache_size() == 1
    gone = [weakref.ref(x) for x in (model, program)]
    del model, program
    gc.collect()
    assert not any(ref() for ref in gone)


def test_a_bound_model_says_what_it_can_do(tiny_folder):
    model, _ = peft_jax.load(tiny_folder)
    apply = peft_jax.bind(model)
    assert apply.model is model
    assert apply.config is model.config
    assert (apply.hidden_states, apply.cache, apply.chain, apply.outdates) == (True,) * 4
    assert (apply.encoder_decoder, apply.experts, apply.dtype) == (False, False, jnp.float32)
    other = peft_jax.bind(linen_model()[0])
    assert not any((other.hidden_states, other.cache, other.chain, other.encoder_decoder))
    with pytest.raises(AttributeError):
        apply.cache = False


def test_a_bound_model_is_an_argument_of_compiled_functions():
    model, params = linen_model()
    one, two = peft_jax.bind(model), peft_jax.bind(model)
    as_pytree, as_static = jax.jit(run_bound), jax.jit(run_bound, static_argnums=0)
    expected = model.apply({"params": params}, TOKENS)
    for apply in (one, two):
        for run in (as_pytree, as_static, lambda apply, *args: jax.jit(apply)(*args)):
            np.testing.assert_allclose(run(apply, params, TOKENS), expected, rtol=1e-6, atol=1e-6)
    assert jax.tree.structure(one) == jax.tree.structure(two)  # so they share programs
    vision = VisionModel(nnx.Rngs(0))
    leaves = jax.tree.leaves(peft_jax.bind(vision))
    assert any(leaf is vision.norm.mean.get_raw_value() for leaf in leaves)


def test_functions_and_wrappers_of_ones_own():
    """An objective takes any function of (params, tokens, ...), and what is wrapped around it."""
    table = np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float32)
    rows = {"tokens": TOKENS, "targets": TARGETS, "weights": np.ones(TOKENS.shape, np.float32)}

    def own(params, tokens, *, rng=None):
        return params[tokens]

    def doubled(call, params, *args, **kwargs):
        return 2 * call(params, *args, **kwargs)

    for apply, factor in ((own, 1), (Bound.of(own), 1), (Bound.of(own).wrap(doubled), 2)):
        loss, _ = next_token(apply, jnp.asarray(table), rows, None)
        assert float(loss) == pytest.approx(nll_of(factor * table[TOKENS]).mean(), rel=1e-5)
    twice = bound_of(own).wrap(doubled).wrap(lambda call, *args: call(*args) + 1)
    np.testing.assert_array_equal(twice(table, TOKENS), 2 * table[TOKENS] + 1)


def test_a_linen_model_without_a_hash_is_bound():
    model, params = linen_model()
    odd = model.clone()
    object.__setattr__(odd, "name", np.zeros(2))  # an array among its fields
    with pytest.raises(TypeError, match="unhashable"):
        hash(odd)
    apply = bound_of(odd)
    assert apply.programs is not bound_of(odd).programs
    assert hash(apply) == hash(apply)


def test_a_program_reads_what_the_bound_model_that_it_is_given_says():
    def own(params, x):
        return params * x

    @jax.jit
    def run(apply, params, x):
        return apply(params, x) + apply.router_loss + len(apply.reads)

    two, three = jnp.float32(2), jnp.float32(3)
    given = [Bound.of(own), Bound.of(own, router_loss=0.5), Bound.of(own, reads=("entities",))]
    assert [float(run(apply, two, three)) for apply in given] == [6.0, 6.5, 7.0]
    assert run._cache_size() == 3
    run(Bound.of(own), two, three)
    assert run._cache_size() == 3
