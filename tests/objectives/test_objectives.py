"""Objectives: parts of a batch add up to the whole, dropout is drawn where it should be, what a
model adds is not lost.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import peft_jax
from peft_jax.core import full
from peft_jax.data import batch_at
from peft_jax.distillation.objective import FeatureTerm, Teacher, beside_teachers, distillation
from peft_jax.knowledge.constraints import constrained
from peft_jax.objectives.contrast import contrast, embed_texts
from peft_jax.objectives.labels import ANSWERS, LABELS, squared_error
from peft_jax.objectives.reading import cross_entropy
from peft_jax.objectives.tokens import TOKENS, balanced, next_token
from peft_jax.training.step import init_state, make_evaluation, make_step
from tests.reference import family_checkpoint, relative_error
from tests.training.test_loop import tiny_rows

ROWS = 16


@pytest.fixture(scope="module")
def setup(tiny_folder):
    model, params = peft_jax.load(tiny_folder)
    return model, params


@pytest.fixture(scope="module")
def batch():
    """Rows of uneven lengths, with few tokens that count and, in some rows, none."""
    rng = np.random.default_rng(0)
    made = dict(batch_at(tiny_rows(ROWS, 16), 0, ROWS, seed=0))
    lengths = rng.integers(3, 17, ROWS)
    seen = np.arange(16)[None] < lengths[:, None]
    counts = seen & (rng.random((ROWS, 16)) < np.where(np.arange(ROWS) % 3 == 0, 0.0, 0.7)[:, None])
    made |= {"segment_ids": seen.astype(np.int32), "weights": counts.astype(np.float32)}
    made["rules"] = np.where(rng.random((ROWS, 16)) < 0.2, 1 + np.arange(16) % 2, 0).astype(
        np.int32
    )
    return made


@pytest.fixture(scope="module")
def pairs(batch):
    rng = np.random.default_rng(1)
    other = np.roll(batch["tokens"], 3, axis=1)
    other[5], other[9] = other[2], other[2]  # the same text thrice
    weights = np.ones(ROWS, np.float32)
    weights[-1] = 0.0
    seen = batch["segment_ids"]
    return {
        "tokens": batch["tokens"],
        "segment_ids": seen,
        "other_tokens": other,
        "other_segment_ids": seen[rng.permutation(ROWS)] | (np.arange(16) < 3),
        "weights": weights,
    }


def _lora(params):
    return peft_jax.lora(
        params, jax.random.key(0), rank=2, targets=["q_proj", "down_proj"], init="gaussian"
    )


def _taught(params):
    return beside_teachers(_lora(params), [jax.tree.map(lambda w: w * 1.1, params)])


def _features(model):
    terms = [FeatureTerm("cosine", 0.7), FeatureTerm("attention", 0.3), FeatureTerm("minilm", 0.5)]
    return distillation(TOKENS, [Teacher(peft_jax.bind(model))], data_weight=0.5, features=terms)


def _rules(model):
    allowed = np.random.default_rng(2).random((2, model.config.vocab_size)) < 0.1
    return functools.partial(constrained, TOKENS, {"allowed": (allowed, 0.5)})


OBJECTIVES = {
    "next_token": (lambda model: next_token, _lora),
    "rules": (_rules, _lora),
    "distillation": (
        lambda model: distillation(TOKENS, [Teacher(peft_jax.bind(model))], data_weight=0.3),
        _taught,
    ),
    "features": (_features, _taught),
    "contrast": (lambda model: contrast, _lora),
}


def _step(apply, tree, objective, batch, accumulate, seed=0):
    """(metrics, gradients) of one step."""
    trainable, frozen = peft_jax.partition(tree)
    keep = optax.GradientTransformationExtraArgs(
        lambda p: p, lambda updates, state, params=None, **_: (updates, updates)
    )
    state = init_state(trainable, keep, seed)
    step = jax.jit(make_step(objective, apply, keep, accumulate=accumulate))
    new, metrics = step(state, frozen, batch)
    return metrics, new.opt_state


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_micro_batches_add_up_to_the_batch(setup, batch, pairs, name):
    model, params = setup
    make, tree = OBJECTIVES[name]
    rows, objective, tree = (
        pairs if name.startswith("contrast") else batch,
        make(model),
        tree(params),
    )
    apply = peft_jax.bind(model)
    whole, grads = _step(apply, tree, objective, rows, 1)
    metrics, found = _step(apply, tree, objective, rows, ROWS if name == "contrast" else 4)
    assert set(metrics) == set(whole)
    for key in set(whole) - {"grad_norm", "skipped", "skipped_in_a_row"}:
        np.testing.assert_allclose(metrics[key], whole[key], rtol=2e-5, atol=1e-6, err_msg=key)
    assert _largest_error(found, grads) < 2e-5


def _largest_error(found, grads):
    """The largest difference of two trees of gradients, over the largest gradient."""
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    return max(
        jax.tree.leaves(
            jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()) / scale, found, grads)
        )
    )


CLASSES, WORDS, WIDE = 3, 20, 6


def _small(classes, by_row=False):
    """A model [B, T, classes] (or one of its rows, [B, classes]) whose tokens see the mean of their
    row, padding left out.
    """

    def apply(params, tokens, *, segment_ids, rng=None, method=None, **_):
        seen = (segment_ids > 0)[..., None]
        x = jnp.take(params["table"].value, tokens, axis=0)
        mean = (x * seen).sum(1) / jnp.maximum(seen.sum(1), 1)
        hidden = jnp.tanh(x + (mean @ params["mix"].value)[:, None])
        hidden = (hidden * seen).sum(1) / jnp.maximum(seen.sum(1), 1) if by_row else hidden
        return hidden if method == "hidden" else hidden @ params["head"].value[:, :classes]

    return apply


def _small_tree():
    rng = np.random.default_rng(3)
    shapes = {"table": (WORDS, WIDE), "mix": (WIDE, WIDE), "head": (WIDE, WORDS)}
    return full(
        {
            name: jnp.asarray(rng.standard_normal(shape), jnp.float32)
            for name, shape in shapes.items()
        }
    )


def _small_taught():
    return beside_teachers(_small_tree(), [jax.tree.map(lambda w: w * 1.1, _small_tree())])


def _small_batch(kind):
    """8 rows of up to 6 tokens with what the objectives of a `kind` read."""
    rng, N, T = np.random.default_rng(4), 8, 6

    def draw(high, *shape):
        return rng.integers(1, high, shape).astype(np.int32)

    lengths = rng.integers(2, T + 1, (2, N))
    own, other = ((np.arange(T) < n[:, None]).astype(np.int32) for n in lengths)
    batch = {"tokens": draw(WORDS, N, T) * own, "segment_ids": own}
    ones = np.asarray([1.0, 0.5, 1.0, 1.0, 0.0, 1.0, 2.0, 1.0], np.float32)
    if kind == "tokens":
        weights = own * (rng.random((N, T)) < 0.6) * ones[:, None]
        return batch | {
            "targets": draw(WORDS, N, T),
            "weights": weights.astype(np.float32),
            "rules": draw(3, N, T) - 1,
        }
    if kind == "tags":
        return batch | {"labels": draw(CLASSES, N, T), "weights": own * ones[:, None]}
    if kind == "answers":
        return batch | {
            "labels": np.minimum(draw(T, N, 2), lengths[0][:, None] - 1).astype(np.int32),
            "weights": ones,
        }
    if kind == "pairs":
        return batch | {
            "other_tokens": draw(WORDS, N, T) * other,
            "other_segment_ids": other,
            "weights": (ones > 0) * 1.0,
        }
    labels = draw(CLASSES, N) if kind == "labels" else rng.standard_normal(N).astype(np.float32)
    return batch | {"labels": labels, "weights": ones}


def _pad(batch, rows=16, length=10):
    """The batch with 4 more columns of padding and 8 more rows of it, so that of 4 micro-batches
    one is nothing else.
    """
    real = [i for i in range(rows) if i % 4 != 2][:8]

    def more(name, x):
        columns = length - x.shape[1] if x.shape[1:] == batch["tokens"].shape[1:] else 0
        x = np.pad(x, [(0, 0), (0, columns)] if columns else [(0, 0)] * x.ndim)
        wide = np.zeros((rows, *x.shape[1:]), x.dtype)
        wide[real] = x
        return wide

    return {name: more(name, x) for name, x in batch.items()}


# name -> (objective, apply, tree, what its batch has): each line of the tasks' table, and what may
# take a line's place, but the masked language model's, which draws its masks anew for each
# micro-batch.
SMALL = {
    "tokens": (next_token, _small(WORDS), _small_tree, "tokens"),
    "tokens in chunks": (
        functools.partial(next_token, chunk=16),
        _small(WORDS),
        _small_tree,
        "tokens",
    ),
    "rules": (
        functools.partial(
            constrained, TOKENS, {"allowed": (np.arange(2 * WORDS).reshape(2, WORDS) % 3 > 0, 0.5)}
        ),
        _small(WORDS),
        _small_tree,
        "tokens",
    ),
    "distillation": (
        distillation(TOKENS, [Teacher(_small(WORDS))], data_weight=0.3),
        _small(WORDS),
        _small_taught,
        "tokens",
    ),
    "labels": (
        functools.partial(cross_entropy, LABELS),
        _small(CLASSES, True),
        _small_tree,
        "labels",
    ),
    "numbers": (squared_error, _small(1, True), _small_tree, "numbers"),
    "tags": (functools.partial(cross_entropy, LABELS), _small(CLASSES), _small_tree, "tags"),
    "answers": (functools.partial(cross_entropy, ANSWERS), _small(2), _small_tree, "answers"),
    "pairs": (contrast, _small(WORDS), _small_tree, "pairs"),
}


@pytest.mark.parametrize("name", list(SMALL))
def test_neither_micro_batches_nor_padding_change_a_step(name):
    objective, apply, tree, kind = SMALL[name]
    batch = _small_batch(kind)
    whole, grads = _step(apply, tree(), objective, batch, 1)
    assert float(whole["grad_norm"]) > 1e-3
    for accumulate, rows in ((2, batch), (4, batch), (1, _pad(batch)), (4, _pad(batch))):
        metrics, found = _step(apply, tree(), objective, rows, accumulate)
        assert _largest_error(found, grads) < 1e-6, (accumulate, len(rows["tokens"]))
        for key in set(whole) - {"skipped", "skipped_in_a_row"}:
            np.testing.assert_allclose(metrics[key], whole[key], rtol=2e-6, atol=1e-7, err_msg=key)


class _One(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="dense")(x)


def test_dropout_is_of_the_key_and_of_each_micro_batch():
    """Row i is the i-th unit vector, so row i of the gradient of `a` is zero where dropout took its
    one feature away.
    """
    N, model = 64, _One()
    params = model.init(jax.random.key(0), jnp.zeros((1, N)))["params"]
    tree = peft_jax.lora(
        params, jax.random.key(1), rank=2, dropout=0.5, targets="dense", init="gaussian"
    )
    tree["dense"]["kernel"] = tree["dense"]["kernel"].replace(b=jnp.ones((2, 4)))
    batch, apply = {"x": np.eye(N, dtype=np.float32)}, peft_jax.bind(model)

    def objective(apply, params, batch, rng):
        return apply(params, batch["x"], rng=rng).mean(), {"weight": jnp.float32(len(batch["x"]))}

    def kept(accumulate, seed=0):
        grads = _step(apply, tree, objective, batch, accumulate, seed)[1]
        return np.asarray(grads["dense"]["kernel"].a)[:, 0] != 0

    for accumulate in (1, 2, 4):
        mask = kept(accumulate)
        assert 0.2 < mask.mean() < 0.8
        np.testing.assert_array_equal(kept(accumulate), mask)
        assert (kept(accumulate, seed=1) != mask).any()
        parts = mask.reshape(-1, accumulate).T
        assert len({tuple(part) for part in parts}) == accumulate
    trainable, frozen = peft_jax.partition(tree)
    loss = jax.jit(make_evaluation(objective, apply))(trainable, frozen, batch)["loss"]
    plain = model.apply({"params": peft_jax.merge(tree)}, batch["x"]).mean()
    np.testing.assert_allclose(loss, plain, rtol=1e-5)


def test_texts_equal_to_a_pairs_own_are_no_negatives(setup, pairs):
    model, params = setup
    apply = peft_jax.bind(model)

    def loss(**options):
        return contrast(apply, params, pairs, None, **options)[0]

    vectors = [
        embed_texts(apply, params, pairs[f"{s}tokens"], pairs[f"{s}segment_ids"])
        for s in ("", "other_")
    ]
    scores = torch.tensor(np.asarray(vectors[0] @ vectors[1].T)[: ROWS - 1, : ROWS - 1] / 0.05)

    def entropy(s):
        return torch.nn.functional.cross_entropy(s, torch.arange(ROWS - 1)).item()

    assert abs(float(loss(same=True)) - (entropy(scores) + entropy(scores.T)) / 2) < 1e-4

    def text(side, i):
        return tuple(np.where(pairs[f"{side}segment_ids"][i] > 0, pairs[f"{side}tokens"][i], -1))

    equal = [
        [i != j and any(text(s, i) == text(s, j) for s in ("", "other_")) for j in range(ROWS - 1)]
        for i in range(ROWS - 1)
    ]
    masked = scores.masked_fill(torch.tensor(equal), -torch.inf)
    assert abs(float(loss()) - (entropy(masked) + entropy(masked.T)) / 2) < 1e-4


def test_a_text_beside_itself_has_another_mask(setup, batch):
    """SimCSE: the same text twice, with dropout, is not one vector."""
    model, params = setup
    tree = peft_jax.lora(
        params,
        jax.random.key(0),
        rank=4,
        alpha=64,
        dropout=0.5,
        targets="all-linear",
        init="gaussian",
    )
    tree = jax.tree.map(
        lambda x: x + 0.05 if x.shape[-1:] == (4,) or x.shape[-2:-1] == (4,) else x, tree
    )
    twice = {
        "tokens": batch["tokens"],
        "segment_ids": batch["segment_ids"],
        "other_tokens": batch["tokens"],
        "other_segment_ids": batch["segment_ids"],
        "weights": np.ones(ROWS, np.float32),
    }
    apply = peft_jax.bind(model)
    with_masks = contrast(apply, tree, twice, jax.random.key(3))[1]["shared"]["vectors"]
    without = contrast(apply, tree, twice, None)[1]["shared"]["vectors"]

    def cosine(v):
        return np.asarray((v[:, 0] * v[:, 1]).sum(-1))

    assert np.abs(cosine(without) - 1).max() < 1e-5
    assert cosine(with_masks).max() < 0.999


def test_adapters_of_the_head_drop_too(tmp_path):
    """LoRA on lm_head has dropout in training, whole or in chunks, and none in evaluation."""
    folder, *_ = family_checkpoint("llama2", tmp_path)
    model, params = peft_jax.load(folder)
    tree = peft_jax.lora(
        params, jax.random.key(0), rank=4, dropout=0.5, targets=["lm_head"], init="gaussian"
    )
    apply = peft_jax.bind(model)
    states = jnp.ones((2, 8, model.config.hidden_size))
    node = tree["lm_head"]["kernel"]
    tree["lm_head"]["kernel"] = node.replace(b=jax.random.normal(jax.random.key(5), node.b.shape))
    batch = {
        "tokens": jnp.zeros((2, 8), jnp.int32),
        "targets": jnp.zeros((2, 8), jnp.int32),
        "weights": jnp.ones((2, 8)),
        "positions": jnp.tile(jnp.arange(8), (2, 1)),
        "segment_ids": jnp.ones((2, 8), jnp.int32),
    }
    head = TOKENS.head(apply, tree, batch)
    assert relative_error(head(states), head(states)) == 0
    first, second = head(states, rng=jax.random.key(1)), head(states, rng=jax.random.key(2))
    assert relative_error(first, second) > 1e-3

    def loss(rng, chunk):
        return float(cross_entropy(TOKENS, apply, tree, batch, rng, chunk=chunk)[0])

    losses = [loss(rng, chunk) for rng in (None, jax.random.key(1)) for chunk in (0, 8)]
    assert abs(losses[0] - losses[1]) < 1e-5
    assert abs(losses[2] - losses[0]) > 1e-4
    assert abs(losses[3] - losses[0]) > 1e-4


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder, *_ = family_checkpoint("mixtral_sliding", tmp_path_factory.mktemp("mixture"))
    return peft_jax.load(folder)


def test_a_mixture_is_balanced_whatever_it_learns_from(mixture):
    model, params = mixture
    apply, key = peft_jax.bind(model), jax.random.key(0)
    batch = batch_at(tiny_rows(4, 8), 0, 4, seed=0)
    batch = {**batch, "tokens": batch["tokens"] % 90, "targets": batch["targets"] % 90}
    router = next_token(apply, params, batch, key, router_loss=0.25)[1]["router"]
    assert float(router) > 0.5
    tree = beside_teachers(params, [params])
    for teacher in (Teacher(apply), Teacher(None)):
        made = distillation(TOKENS, [teacher], data_weight=1.0, router_loss=0.25)
        loss, metrics = made(apply, tree, batch, key)
        assert relative_error(metrics["router"], router) < 1e-5
        rest = made(apply, tree, batch, None)[0]
        assert abs(float(loss) - float(rest) - 0.25 * float(router)) < 1e-5
    allowed = np.ones((1, model.config.vocab_size), bool)
    ruled = balanced(functools.partial(constrained, TOKENS, {"allowed": (allowed, 1.0)}), 0.25)
    loss, metrics = ruled(apply, params, {**batch, "rules": np.ones_like(batch["tokens"])}, key)
    assert relative_error(metrics["router"], router) < 1e-5
