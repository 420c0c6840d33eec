"""Statistics of inputs: what pads a row does not count, of whatever model."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import peft_jax
from peft_jax.core.calibrate import calibrate, capped
from peft_jax.core.weight import materialize, matmul, ragged_matmul
from peft_jax.pruning.importance import block_influence
from tests.models.test_encoders import T5_SIZES
from tests.reference import family_checkpoint, random_tokens, relative_error

KINDS = ("covariance", "centred_covariance", "second_moment", "mean", "mean_abs", "max_abs")


def _padded(tokens, length):
    """The rows with padding after them that is 89% of the whole."""
    rows = np.zeros((len(tokens), length), np.int32)
    rows[:, : tokens.shape[1]] = tokens
    seen = (np.arange(length)[None] < tokens.shape[1]).astype(np.int32) * np.ones((len(tokens), 1), np.int32)
    return {"tokens": rows, "segment_ids": seen, "positions": np.tile(np.arange(length, dtype=np.int32), (len(rows), 1))}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder, *_ = family_checkpoint("llama2", tmp_path_factory.mktemp("base"))
    return peft_jax.load(folder)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder, *_ = family_checkpoint("mixtral_sliding", tmp_path_factory.mktemp("mixture"))
    return peft_jax.load(folder)


@pytest.mark.parametrize(
    ("family", "target", "statistic", "cap"),
    [
        *(("llama", "q_proj", kind, None) for kind in KINDS),
        *(("mixture", "gate_up_proj", kind, None) for kind in KINDS),
        ("llama", "q_proj", "second_moment", 0.8),
        ("mixture", "gate_up_proj", "covariance", 0.8),
    ],
)
def test_padding_does_not_count(family, target, statistic, cap, request):
    """Rows with 11% tokens give what these tokens give alone, each expert too."""
    model, params = request.getfixturevalue(family)
    tokens, apply = random_tokens(3, 6), peft_jax.bind(model)
    where = {"statistic": statistic, "targets": [target, "down_proj"], "token_cap": cap}
    alone = calibrate(apply, params, [{"tokens": tokens}], **where)
    padded = calibrate(apply, params, [_padded(tokens, 54)], **where)
    for path, found in alone.items():
        assert relative_error(padded[path], found) < 1e-5
        np.testing.assert_array_equal(padded.tokens[path], alone.tokens[path])


def _identity_of(rows):
    """A model of one weight, and its inputs [N, in] in one batch."""
    apply = lambda params, tokens, **_: matmul(jnp.asarray(rows)[tokens], params["up_proj"]["kernel"])
    return apply, {"up_proj": {"kernel": jnp.eye(rows.shape[1])}}, [{"tokens": np.arange(len(rows))[None]}]


def test_a_token_counts_for_no_more_than_its_cap():
    """Against the formula in NumPy; the largest values stay what they are."""
    rows = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    rows[0] *= 300
    given = _identity_of(rows)
    energy = np.square(rows).sum(1)
    short = rows * np.sqrt(np.minimum(1.0, 4 * np.median(energy) / energy))[:, None]
    found = calibrate(*given, token_cap=4.0)["up_proj/kernel"]
    assert relative_error(found, short.T @ short / 9) < 1e-6
    assert relative_error(calibrate(*given)["up_proj/kernel"], short.T @ short / 9) > 100
    squares = calibrate(*given, token_cap=4.0, statistic="second_moment")["up_proj/kernel"]
    assert relative_error(squares, np.diag(short.T @ short) / 9) < 1e-6
    largest = calibrate(*given, token_cap=4.0, statistic="max_abs")["up_proj/kernel"]
    assert relative_error(largest, np.abs(rows).max(0)) < 1e-6


def test_a_cap_of_rows_that_are_mostly_zero_leaves_them():
    """Where more than half of the tokens are zero the median says nothing."""
    rows = jnp.zeros((5, 3)).at[0].set(2.0)
    np.testing.assert_array_equal(capped(rows, 4.0, jnp.ones(5, bool)), rows)
    with pytest.raises(ValueError, match="token_cap must be positive"):
        calibrate(*_identity_of(np.eye(3, dtype=np.float32)), token_cap=0.0)


def test_the_influence_of_layers_is_that_of_tokens(llama):
    model, params = llama
    tokens = random_tokens(3, 6)
    alone = block_influence(model, params, [{"tokens": tokens}])
    assert relative_error(block_influence(model, params, [_padded(tokens, 54)]), alone) < 1e-5


def test_an_encoder_decoder_is_calibrated_on_its_targets(tmp_path):
    """Second moments of the decoder's and the encoder's inputs against those that PyTorch's modules get."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    theirs = T5ForConditionalGeneration(T5Config(**T5_SIZES)).eval()
    theirs.save_pretrained(tmp_path)
    model, params = peft_jax.load(tmp_path, scan_layers=False)
    T = 8
    tokens, targets = random_tokens(2, T), random_tokens(2, T, seed=1)
    seen = np.asarray([[1] * T, [1] * 5 + [0] * 3], np.int32)
    counts = np.asarray([[1] * 6 + [0] * 2, [1] * T], np.float32)
    batch = {"tokens": tokens, "segment_ids": seen, "decoder_tokens": targets, "weights": counts}
    found = calibrate(peft_jax.bind(model), params, [batch], statistic="second_moment", targets=["q", "wi"])
    inputs = {}

    def keep(name, x):
        inputs[name] = x.detach().numpy()

    for name, module in theirs.named_modules():
        if name.endswith((".q", ".wi")):
            module.register_forward_pre_hook(lambda _, x, name=name: keep(name, x[0]))
    with torch.no_grad():
        theirs(input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(seen).long(),
               decoder_input_ids=torch.tensor(targets).long())  # fmt: skip
    assert len(found) == len(inputs) > 4
    means = sorted(
        float(np.mean(np.square(x)[(seen if name.startswith("encoder") else counts) > 0])) for name, x in inputs.items()
    )
    np.testing.assert_allclose(sorted(float(jnp.mean(x)) for x in found.values()), means, rtol=1e-4)


@pytest.mark.parametrize("square", [False, True])
def test_gradients_of_half_precision_are_added_up_in_float32(square):
    """1,000 batches: a sum in bfloat16 stops to grow at 256 times what is added."""
    inputs = np.asarray(jnp.asarray(1.0 + np.random.default_rng(0).random((1000, 2, 2)), jnp.bfloat16))
    params = {"kernel": jnp.zeros((2, 2), jnp.bfloat16)}
    found = peft_jax.gradients(lambda p, x: jnp.sum(materialize(p["kernel"]) * x), params, inputs, square=square)["kernel"]
    expected = (inputs.astype(np.float64) ** (2 if square else 1)).mean(0)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_covariances_about_the_mean_are_numpys_for_each_expert():
    """Of a product whose weight is one of several each has the rows that it gets."""
    rows = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32) + 3.0
    sizes = np.asarray([25, 15, 0])
    params = {"experts": {"down_proj": jnp.zeros((3, 6, 4))}}
    apply = lambda p, tokens: ragged_matmul(jnp.asarray(rows), p["experts"]["down_proj"], jnp.asarray(sizes))
    found = calibrate(apply, params, [{"tokens": np.ones((1, 40), np.int32)}], statistic="centred_covariance")
    for of, part in zip(found["experts/down_proj"], np.split(rows, np.cumsum(sizes)[:-1]), strict=True):
        expected = np.cov(part.T, bias=True) * len(part) / 40 if len(part) else np.zeros((6, 6))
        np.testing.assert_allclose(of, expected, atol=1e-5)
