"""Techniques on every kind of model: identity at the start, gradients, merging, a quantized and a
pruned base.

The method matrix holds each method to its properties on decoders and third-party models; this holds
each kind of model to them with a method of every kind.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as tr

import peft_jax
from tests.models.test_encoders import T5_SIZES, torch_encoder
from tests.reference import family_checkpoint, perturb, random_tokens, relative_error

TOKENS, TARGETS = random_tokens(2, 10), random_tokens(2, 6, seed=1)
KINDS = ["bert", "deberta_v3", "modernbert", "distilbert", "gpt2", "t5", "mixtral_sliding"]
FEW = ("bert", "t5", "mixtral_sliding")
METHODS = {
    "lora": lambda p, k: peft_jax.lora(p, k, rank=2),
    "dora": lambda p, k: peft_jax.dora(p, k, rank=2),
    "ia3": lambda p, k: peft_jax.ia3(p, k),
    "houlsby": lambda p, k: peft_jax.bottleneck(p, k, placement="houlsby", size=3),
    "pfeiffer": lambda p, k: peft_jax.bottleneck(p, k, placement="pfeiffer", size=3),
    "prefix_tuning": lambda p, k: peft_jax.prefix_tuning(p, k, num_virtual_tokens=3),
    "prompt_tuning": lambda p, k: peft_jax.prompt_tuning(p, k, num_virtual_tokens=3),
    "ln_tuning": lambda p, k: peft_jax.ln_tuning(p),
    "full": lambda p, k: peft_jax.full(p),
}
NOT_IDENTITY = ("prefix_tuning", "prompt_tuning")
CASES = [
    (k, m)
    for k in KINDS
    for m in METHODS
    if k in FEW or m in ("lora", "pfeiffer", "prefix_tuning", "ia3")
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """kind -> (model, params, run, run with gradient)."""
    root, known = tmp_path_factory.mktemp("families"), {}

    def get(kind):
        if kind in known:
            return known[kind]
        if kind == "t5":
            torch.manual_seed(0)
            tr.T5ForConditionalGeneration(
                tr.T5Config(**T5_SIZES, feed_forward_proj="gated-gelu")
            ).save_pretrained(root / kind)
            folder = root / kind
        elif kind in ("gpt2", "mixtral_sliding"):
            folder = family_checkpoint(kind, root)[0]
        else:
            torch_encoder(kind, "token_classification").save_pretrained(root / kind)
            folder = root / kind
        model, params = peft_jax.load(folder)
        apply, more = peft_jax.bind(model, strict=True), [TARGETS] if kind == "t5" else []
        run = jax.jit(lambda p: apply(p, TOKENS, *more))

        @jax.jit
        def gradient(trainable, frozen):
            def loss(t):
                out = apply(peft_jax.combine(t, frozen), TOKENS, *more)
                return (out**2).mean(), out

            return jax.grad(loss, has_aux=True)(trainable)

        known[kind] = model, params, run, gradient
        return known[kind]

    return get


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_a_method_on_a_kind_of_model(bases, kind, method):
    _, base, run, gradient = bases(kind)
    params = METHODS[method](base, jax.random.key(0))
    if method not in NOT_IDENTITY:
        assert relative_error(run(peft_jax.merge(params)), run(base)) < 1e-5
    moved = perturb(params)
    grads, out = gradient(*peft_jax.partition(moved))
    if method not in NOT_IDENTITY:
        assert relative_error(gradient(*peft_jax.partition(params))[1], run(base)) < 1e-5
    unseen = (
        "attn_norm",
        "key",
        "k_lin",
    )  # of the first layer, and shifts that a softmax does not see
    for path, g in jax.tree_util.tree_flatten_with_path(grads)[0]:
        name = jax.tree_util.keystr(path)
        assert np.isfinite(g).all(), name
        assert float(jnp.abs(g).max()) > 1e-12 or any(u in name for u in unseen), name
    assert relative_error(out, run(base)) > 1e-4
    assert relative_error(run(peft_jax.merge(moved)), out) < 5e-5


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_and_pruned_bases(bases, kind):
    _, base, run, gradient = bases(kind)
    small = peft_jax.quantize(base, peft_jax.Int(bits=8, block_size=4), targets="all-linear")
    assert relative_error(run(small), run(peft_jax.dequantize(small))) < 1e-5
    assert relative_error(run(small), run(base)) < 0.2
    zeros = peft_jax.prune(base, 0.5, targets="all-linear")
    over = perturb(peft_jax.lora(small, jax.random.key(0), rank=2))
    _, out = gradient(*peft_jax.partition(over))
    assert relative_error(run(peft_jax.merge(over)), out) < 5e-5
    kept = peft_jax.merge(
        perturb(peft_jax.mask_updates(peft_jax.lora(zeros, jax.random.key(0), rank=2)))
    )

    def zero(w):
        return np.asarray(peft_jax.materialize(w)) == 0

    def gone(tree):
        return {p: zero(w) for p, w in peft_jax.places(tree).items() if hasattr(w, "shape")}

    before, after = gone(zeros), gone(kept)
    pruned = [p for p, w in peft_jax.places(zeros).items() if isinstance(w, peft_jax.Masked)]
    assert pruned
    for path in pruned:
        assert before[path].mean() == pytest.approx(0.5, abs=0.02)
        np.testing.assert_array_equal(after[path], before[path])
