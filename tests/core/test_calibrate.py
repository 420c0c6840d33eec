"""Statistics of inputs: what pads a row does not count, of whatever model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import peft_jax
from peft_jax.core import gradients
from peft_jax.core.calibrate import calibrate, capped
from peft_jax.core.weight import materialize, matmul, ragged_matmul
from peft_jax.pruning.importance import block_influence
from peft_jax.quantization.quantize import embedding_layout
from tests.models.test_encoders import ENCODERS, T5_SIZES
from tests.reference import family_checkpoint, random_tokens, relative_error

KINDS = ("covariance", "centred_covariance", "second_moment", "mean", "mean_abs", "max_abs")


def _padded(tokens, length):
    """The rows with padding after them that is 89% of the whole."""
    rows = np.zeros((len(tokens), length), np.int32)
    rows[:, : tokens.shape[1]] = tokens
    seen = (np.arange(length)[None] < tokens.shape[1]).astype(np.int32) * np.ones(
        (len(tokens), 1), np.int32
    )
    return {
        "tokens": rows,
        "segment_ids": seen,
        "positions": np.tile(np.arange(length, dtype=np.int32), (len(rows), 1)),
    }


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

    def apply(params, tokens, **_):
        return matmul(jnp.asarray(rows)[tokens], params["up_proj"]["kernel"])

    return (
        apply,
        {"up_proj": {"kernel": jnp.eye(rows.shape[1])}},
        [{"tokens": np.arange(len(rows))[None]}],
    )


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
    """Second moments of the decoder's and the encoder's inputs against those that PyTorch's modules
    get.
    """
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
    found = calibrate(
        peft_jax.bind(model), params, [batch], statistic="second_moment", targets=["q", "wi"]
    )
    inputs = {}

    def keep(name, x):
        inputs[name] = x.detach().numpy()

    for name, module in theirs.named_modules():
        if name.endswith((".q", ".wi")):
            module.register_forward_pre_hook(lambda _, x, name=name: keep(name, x[0]))
    with torch.no_grad():
        theirs(
            input_ids=torch.tensor(tokens).long(),
            attention_mask=torch.tensor(seen).long(),
            decoder_input_ids=torch.tensor(targets).long(),
        )
    assert len(found) == len(inputs) > 4
    means = sorted(
        float(np.mean(np.square(x)[(seen if name.startswith("encoder") else counts) > 0]))
        for name, x in inputs.items()
    )
    np.testing.assert_allclose(sorted(float(jnp.mean(x)) for x in found.values()), means, rtol=1e-4)


@pytest.mark.parametrize("square", [False, True])
def test_gradients_of_half_precision_are_added_up_in_float32(square):
    """1,000 batches: a sum in bfloat16 stops to grow at 256 times what is added."""
    inputs = np.asarray(
        jnp.asarray(1.0 + np.random.default_rng(0).random((1000, 2, 2)), jnp.bfloat16)
    )
    params = {"kernel": jnp.zeros((2, 2), jnp.bfloat16)}
    found = gradients(
        lambda p, x: jnp.sum(materialize(p["kernel"]) * x), params, inputs, square=square
    )["kernel"]
    expected = (inputs.astype(np.float64) ** (2 if square else 1)).mean(0)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_covariances_about_the_mean_are_numpys_for_each_expert():
    """Of a product whose weight is one of several each has the rows that it gets."""
    rows = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32) + 3.0
    sizes = np.asarray([25, 15, 0])
    params = {"experts": {"down_proj": jnp.zeros((3, 6, 4))}}

    def apply(p, tokens):
        return ragged_matmul(jnp.asarray(rows), p["experts"]["down_proj"], jnp.asarray(sizes))

    found = calibrate(
        apply, params, [{"tokens": np.ones((1, 40), np.int32)}], statistic="centred_covariance"
    )
    for of, part in zip(
        found["experts/down_proj"], np.split(rows, np.cumsum(sizes)[:-1]), strict=True
    ):
        expected = np.cov(part.T, bias=True) * len(part) / 40 if len(part) else np.zeros((6, 6))
        np.testing.assert_allclose(of, expected, atol=1e-5)


class _Twice(nn.Module):
    """A layer that its model calls twice: all means and maxima are over both calls."""

    @nn.compact
    def __call__(self, tokens):
        layer = nn.Dense(4, use_bias=False, name="up_proj")
        x = jax.nn.one_hot(tokens, 4)
        return layer(jnp.tanh(layer(x)) * 0.5)


@pytest.mark.parametrize("statistic", KINDS)
def test_a_layer_called_twice_is_one_layer_with_the_inputs_of_both_calls(statistic):
    tokens = np.asarray([[0, 1, 3], [2, 1, 1]], np.int32)
    model = _Twice()
    params = model.init(jax.random.key(0), tokens)["params"]
    batches = [{"tokens": tokens}, {"tokens": tokens[:, ::-1]}]
    found = calibrate(peft_jax.bind(model), params, batches, statistic=statistic)
    first = np.eye(4)[tokens].reshape(-1, 4)
    rows = np.concatenate([first, np.tanh(first @ np.asarray(params["up_proj"]["kernel"])) * 0.5])
    expected = {
        "covariance": rows.T @ rows / len(rows),
        "centred_covariance": np.cov(rows.T, bias=True),
        "second_moment": np.square(rows).mean(0),
        "mean": rows.mean(0),
        "mean_abs": np.abs(rows).mean(0),
        "max_abs": np.abs(rows).max(0),
    }[statistic]
    np.testing.assert_allclose(found["up_proj/kernel"], expected, rtol=1e-5, atol=1e-7)
    assert found.tokens["up_proj/kernel"] == 2 * len(rows)


def test_experts_called_twice_have_the_largest_inputs_of_both_calls():
    x = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
    sizes = np.asarray([2, 0, 3])

    def apply(params, tokens, **_):
        w = params["experts"]["gate_up_proj"]
        return sum(ragged_matmul(rows, w, jnp.asarray(sizes)) for rows in jnp.asarray(x))

    tree = {"experts": {"gate_up_proj": jnp.ones((3, 4, 5))}}
    found = calibrate(apply, tree, [{"tokens": np.zeros((1, 6), np.int32)}], statistic="max_abs")
    expected = [np.abs(x[:, :2]).max((0, 1)), np.zeros(4), np.abs(x[:, 2:5]).max((0, 1))]
    np.testing.assert_array_equal(found["experts/gate_up_proj"], np.asarray(expected))


def test_uses_that_cannot_be_told_apart_are_refused():
    """A weight that a scan shares, and one of a compiled function that is called twice: a mean is
    one all the same.
    """
    rows = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    params, batches = {"up_proj": {"kernel": jnp.eye(4)}}, [{"tokens": np.arange(3)[None]}]

    def scanned(params, tokens, **_):
        def step(x, _):
            return (matmul(x, params["up_proj"]["kernel"]), None)

        return jax.lax.scan(step, jnp.asarray(rows)[tokens], None, length=2)[0]

    product = jax.jit(lambda w, x: matmul(x, w))

    def compiled(params, tokens, **_):
        return product(
            params["up_proj"]["kernel"],
            product(params["up_proj"]["kernel"], jnp.asarray(rows)[tokens]),
        )

    for apply in (scanned, compiled):
        np.testing.assert_allclose(
            calibrate(apply, params, batches, statistic="mean_abs")["up_proj/kernel"],
            np.abs(rows).mean(0),
            rtol=1e-5,
        )
        with pytest.raises(
            ValueError,
            match="up_proj/kernel is used several times by one loop or compiled function",
        ):
            calibrate(apply, params, batches, statistic="max_abs")


def test_a_compiled_model_is_calibrated_again_and_again():
    """What an earlier trace left behind does not hide a use."""
    rows = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)

    def twice(params, tokens, **_):
        return matmul(
            2.0 * matmul(jnp.asarray(rows)[tokens], params["up_proj"]["kernel"]),
            params["up_proj"]["kernel"],
        )

    params, batches = {"up_proj": {"kernel": jnp.eye(4)}}, [{"tokens": np.arange(3)[None]}]
    apply = jax.jit(twice)
    for _ in range(2):
        found = calibrate(apply, params, batches, statistic="max_abs")["up_proj/kernel"]
        np.testing.assert_allclose(found, 2.0 * np.abs(rows).max(0), rtol=1e-6)


def _largest_inputs(theirs, names, **inputs):
    """name -> the largest |x| [in] that PyTorch's modules get, over all of their calls."""
    found, hooks = {}, []

    def keep(name, x):
        own = x.detach().abs().reshape(-1, x.shape[-1]).amax(0)
        found[name] = own if name not in found else torch.maximum(found[name], own)

    for name, module in theirs.named_modules():
        if name.endswith(names):
            hooks.append(module.register_forward_pre_hook(lambda _, x, name=name: keep(name, x[0])))
    with torch.no_grad():
        theirs(**inputs)
    for hook in hooks:
        hook.remove()
    return {name: x.numpy() for name, x in found.items()}


@pytest.mark.parametrize("scan", [True, False])
def test_projections_that_deberta_shares_have_the_largest_inputs_of_both_uses(tmp_path, scan):
    """Queries and keys are made of hidden states and of relative positions, by the same weights."""
    from transformers import DebertaV2Model

    torch.manual_seed(0)
    theirs = DebertaV2Model(ENCODERS["deberta_v3"]()).eval()
    with torch.no_grad():
        theirs.encoder.rel_embeddings.weight.mul_(60)
        theirs.encoder.LayerNorm.weight.mul_(
            torch.linspace(0.3, 2, len(theirs.encoder.LayerNorm.weight))
        )
    theirs.save_pretrained(tmp_path)
    model, params = peft_jax.load(tmp_path, scan_layers=scan, task="feature_extraction")
    tokens = random_tokens(2, 6)
    found = calibrate(
        peft_jax.bind(model),
        params,
        [{"tokens": tokens}],
        statistic="max_abs",
        targets=["query_proj", "key_proj"],
    )
    expected = _largest_inputs(
        theirs,
        ("query_proj", "key_proj"),
        input_ids=torch.tensor(tokens).long(),
        attention_mask=torch.ones(2, 6).long(),
    )
    for leaf in ("query_proj", "key_proj"):
        ours = [x for path, x in found.items() if leaf in path]
        ours = ours[0] if scan else np.stack(ours)
        np.testing.assert_allclose(
            ours, np.stack([x for name, x in expected.items() if leaf in name]), rtol=1e-4
        )


def test_an_embedding_that_is_a_head_too_has_the_inputs_of_the_head(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    theirs = T5ForConditionalGeneration(T5Config(**T5_SIZES)).eval()
    theirs.save_pretrained(tmp_path)
    model, params = peft_jax.load(tmp_path)
    tokens, targets = random_tokens(2, 7), random_tokens(2, 5, seed=1)
    batch = {"tokens": tokens, "decoder_tokens": targets, "weights": np.ones((2, 5), np.float32)}
    layout = embedding_layout(params)
    path = next(p for p in layout if "shared" in p)
    found = calibrate(
        peft_jax.bind(model), params, [batch], statistic="max_abs", targets=path, layout=layout
    )
    expected = _largest_inputs(
        theirs,
        "lm_head",
        input_ids=torch.tensor(tokens).long(),
        decoder_input_ids=torch.tensor(targets).long(),
    )
    np.testing.assert_allclose(found[path], expected["lm_head"], rtol=1e-4)
    assert found.tokens[path] == targets.size
