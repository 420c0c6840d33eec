"""Products of weights against NumPy: axes, transposes, einsums, embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax
from peft_jax.core import einsum, matmul, take
from peft_jax.core.weight import from_matrix, to_matrix
from peft_jax.low_rank.lora import LoRA
from tests.reference import relative_error


def lora_over(shape, in_axes, out_axes, rank=3):
    w = jax.random.normal(jax.random.key(0), shape)
    tree = peft_jax.lora(
        {"kernel": w},
        jax.random.key(1),
        rank=rank,
        alpha=6,
        targets="kernel",
        layout={"kernel": (in_axes, out_axes)},
    )
    node = tree["kernel"]
    return node.replace(b=jax.random.normal(jax.random.key(2), node.b.shape))


@pytest.mark.parametrize(
    ("equation", "x_shape", "w_shape", "in_axes", "out_axes"),
    [
        ("btd,df->btf", (2, 3, 4), (4, 5), (-2,), (-1,)),
        ("btd,dnh->btnh", (2, 3, 4), (4, 2, 5), (-3,), (-2, -1)),
        ("btd,ndh->btnh", (2, 3, 4), (2, 4, 5), (-2,), (-3, -1)),
        ("btnh,nhd->btd", (2, 3, 2, 5), (2, 5, 4), (-3, -2), (-1,)),
        ("...d,dh->...h", (2, 3, 4), (4, 5), (-2,), (-1,)),
        ("btd,vd->btv", (2, 3, 4), (7, 4), (-1,), (-2,)),
        ("ebd,edh->ebh", (2, 3, 4), (2, 4, 5), (-2,), (-1,)),
        ("bed,edh->ebh", (3, 2, 4), (2, 4, 5), (-2,), (-1,)),
        ("bd,df->fb", (3, 4), (4, 5), (-2,), (-1,)),
        (
            "bd,df->b",
            (3, 4),
            (4, 5),
            (-2,),
            (-1,),
        ),  # sums over an output: only on the materialised weight
    ],
)
def test_einsum_equals_dense(equation, x_shape, w_shape, in_axes, out_axes):
    w = lora_over(w_shape, in_axes, out_axes)
    x = jax.random.normal(jax.random.key(3), x_shape)
    expected = np.einsum(equation, np.asarray(x), np.asarray(w.materialize()))
    assert relative_error(einsum(equation, x, w), expected) < 1e-5
    assert relative_error(einsum(equation, x, w.materialize()), expected) < 1e-5


@pytest.mark.parametrize(
    ("in_axes", "out_axes"),
    [((-2,), (-1,)), ((-3,), (-2, -1)), ((-2,), (-3, -1)), ((-1, -3), (-2,))],
)
def test_matrix_form_is_invertible(in_axes, out_axes):
    shape = (2, 3, 4) if len(in_axes) + len(out_axes) == 2 else (6, 2, 3, 4)
    w = jnp.arange(np.prod(shape)).reshape(shape)
    m = to_matrix(w, in_axes, out_axes)
    assert m.ndim == 3
    np.testing.assert_array_equal(from_matrix(m, shape, in_axes, out_axes), w)


def test_take_and_attend_use_the_same_weight():
    w = lora_over((7, 4), (-2,), (-1,))
    ids, x = jnp.asarray([[1, 6], [0, 3]]), jax.random.normal(jax.random.key(3), (2, 4))
    full = np.asarray(w.materialize())
    assert relative_error(take(w, ids), full[np.asarray(ids)]) < 1e-5
    assert (
        relative_error(matmul(x, w, in_axes=(-1,), out_axes=(-2,)), np.asarray(x) @ full.T) < 1e-5
    )


def test_two_adapters_at_once():
    w = lora_over((4, 5), (-2,), (-1,))
    both = peft_jax.lora(
        {"kernel": w}, jax.random.key(5), rank=2, targets="kernel", adapter="second"
    )["kernel"]
    both = both.replace(b=jax.random.normal(jax.random.key(6), both.b.shape))
    x = jax.random.normal(jax.random.key(3), (2, 4))
    assert isinstance(both.base, LoRA)
    assert relative_error(matmul(x, both), x @ both.materialize()) < 1e-5


def test_wrong_axes_name_the_remedy():
    w = lora_over((4, 2, 5), (-2,), (-1,))  # made as a stack of [2, 5] matrices
    with pytest.raises(ValueError, match=r"pass layout=peft_jax.core.layout_of"):
        matmul(jnp.ones((3, 4)), w, in_axes=(-3,), out_axes=(-2, -1))
    with pytest.raises(ValueError, match=r"1 input and 1 output axes"):
        matmul(jnp.ones((3, 4)), w)


def test_merge_keeps_the_base_dtype():
    w = lora_over((4, 5), (-2,), (-1,)).replace(base=jnp.ones((4, 5), jnp.bfloat16))
    assert w.merge().dtype == jnp.bfloat16
