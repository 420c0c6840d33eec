"""DoRA against Hugging Face PEFT where the base changes beneath it, by its array, and in
bfloat16.
"""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from peft_jax.core import matmul
from peft_jax.low_rank import dora
from peft_jax.low_rank.dora import DoRA
from tests.reference import relative_error

IN, OUT, RANK = 12, 20, 3
FIELDS = {"a": "lora_A", "b": "lora_B", "magnitude": "lora_magnitude_vector"}


def theirs(dtype=torch.float32):
    """A linear layer with PEFT's DoRA, every array of it moved."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False)).to(dtype)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=RANK, lora_alpha=5, use_dora=True, target_modules=["0"])
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    return model


def parts(model):
    """name -> tensor [r, in], [out, r] and [out]."""
    return {
        f: next(p for n, p in model.named_parameters() if key in n) for f, key in FIELDS.items()
    }


def weight_of(model):
    return next(p for n, p in model.named_parameters() if "base_layer" in n)


def ours(model):
    arrays = {f: jnp.asarray(p.detach().float().numpy().T) for f, p in parts(model).items()}
    base = jnp.asarray(weight_of(model).detach().float().numpy().T)
    half = weight_of(model).dtype == torch.bfloat16
    return DoRA(
        base=base.astype(jnp.bfloat16) if half else base, scale=jnp.float32(5 / RANK), **arrays
    )


def pruned(w):
    kept = np.random.default_rng(1).random(w.shape) < 0.3
    return jnp.where(kept, w, 0)


@pytest.mark.parametrize("path", ["product", "array"])
@pytest.mark.parametrize("changed", [False, True], ids=["as it was", "pruned afterwards"])
def test_values_and_gradients_equal_peft(path, changed):
    model, x = theirs(), np.random.default_rng(0).standard_normal((7, IN)).astype(np.float32)
    node = ours(model)
    if changed:
        node = node.replace(base=pruned(node.base))
        with torch.no_grad():
            weight_of(model).copy_(torch.tensor(np.asarray(node.base.T)))
    y = model(torch.tensor(x))
    (y**2).sum().backward()

    def loss(arrays):
        w = node.replace(**arrays)
        out = matmul(x, w) if path == "product" else x @ w.materialize()
        return (out**2).sum(), out

    grads, out = jax.grad(loss, has_aux=True)({f: getattr(node, f) for f in FIELDS})
    assert relative_error(out, y.detach().numpy()) < 1e-5
    for name, p in parts(model).items():
        assert relative_error(grads[name].T, p.grad.numpy()) < 1e-5, name


def test_a_small_change_of_the_magnitude_reaches_bfloat16_as_in_peft():
    """0.15%, which is less than bfloat16 resolves of one: on average over many products it is
    there.
    """
    model, x = (
        theirs(torch.bfloat16),
        np.random.default_rng(0).standard_normal((4096, IN)).astype(np.float32),
    )
    node, given = ours(model), torch.tensor(x).to(torch.bfloat16)
    tokens = jnp.asarray(given.float().numpy()).astype(jnp.bfloat16)

    def product(w):
        return np.asarray(matmul(tokens, w).astype(jnp.float32))

    def share(new, old):
        return float((new - old).ravel() @ old.ravel() / (old.ravel() @ old.ravel()))

    found = share(product(node.replace(magnitude=1.0015 * node.magnitude)), product(node))
    before = model(given).detach().float().numpy()
    with torch.no_grad():
        parts(model)["magnitude"].mul_(1.0015)
    expected = share(model(given).detach().float().numpy(), before)
    assert found == pytest.approx(0.0015, abs=3e-4)
    assert expected == pytest.approx(0.0015, abs=6e-4)


def test_outputs_that_are_zero_stay_zero():
    """A pruned output has no direction: PEFT divides 0 by 0 there."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(IN, OUT)), jnp.float32).at[:, 3].set(0.0)
    params = dora({"up_proj": {"kernel": w}}, jax.random.key(0), rank=RANK)
    node = params["up_proj"]["kernel"]
    x = jnp.ones((2, IN))
    for found in (matmul(x, node), x @ node.materialize()):
        np.testing.assert_allclose(found, x @ w, rtol=1e-5, atol=1e-5)
    grads = jax.grad(lambda n: jnp.sum(matmul(x, n) ** 2))(node)
    assert all(np.isfinite(g).all() for g in (grads.a, grads.b, grads.magnitude))
