"""Starts of LoRA's factors, layers one by one, LoRA+, and AdaLoRA's budget."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from peft.utils.incremental_pca import IncrementalPCA

import peft_jax
from peft_jax.core import calibrate, gradients, places
from peft_jax.core.partition import penalty
from peft_jax.low_rank import adalora, loha, oft, rebase, trainable_tokens
from peft_jax.low_rank.adalora import adalora_budget
from peft_jax.methods import METHODS
from peft_jax.training.optimizer import lora_plus
from tests.reference import (
    FAMILIES,
    family_checkpoint,
    perturb,
    random_tokens,
    relative_error,
    torch_logits,
    torch_model,
)

TOKENS = random_tokens(4, 16)
Q = "model/layers/self_attn/q_proj/kernel"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder, _, _ = family_checkpoint("llama2", tmp_path_factory.mktemp("base"))
    model, params = peft_jax.load(folder)
    apply = peft_jax.bind(model)
    statistics = {
        "covariance": calibrate(apply, params, [{"tokens": TOKENS}]),
        "centred_covariance": calibrate(
            apply,
            params,
            [{"tokens": TOKENS[:3]}, {"tokens": TOKENS[3:]}],
            statistic="centred_covariance",
        ),
        "gradient": gradients(lambda p, t: (apply(p, t) ** 2).mean(), params, [TOKENS]),
    }
    return model, params, jax.jit(apply), statistics


NEEDS = {
    "eva": "centred_covariance",
    "corda_kpm": "covariance",
    "corda_ipm": "covariance",
    "lora_ga": "gradient",
}
STARTS = ["gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", *NEEDS]


def started(base, init, **options):
    _, params, _, statistics = base
    given = {"statistics": statistics[NEEDS[init]]} if init in NEEDS else {}
    return peft_jax.lora(params, jax.random.key(0), rank=4, alpha=8, init=init, **given, **options)


@pytest.mark.parametrize("init", STARTS)
def test_every_start_leaves_the_model_as_it_was_and_the_base_in_place(base, init):
    _, params, run, _ = base
    tree = started(base, init)
    assert relative_error(run(tree, TOKENS), run(params, TOKENS)) < 1e-5
    np.testing.assert_array_equal(places(tree)[Q].base, places(params)[Q])
    moved = perturb(tree)
    assert relative_error(run(rebase(moved), TOKENS), run(moved, TOKENS)) < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_from_the_weight_equal_peft(base, init):
    """The product A B that PEFT takes out of the base is the one that ours subtracts."""
    theirs = peft.get_peft_model(
        torch_model(FAMILIES["llama2"]()),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=init),
    )
    node = places(started(base, init, targets="q_proj"))[Q]
    for i in range(3):
        layer = theirs.base_model.model.model.layers[i].self_attn.q_proj
        product = (
            (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach().numpy().T
        )
        np.testing.assert_allclose(node.start[0][i] @ node.start[1][i], product, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["pissa", "corda_ipm", "lora_ga"])
def test_starts_that_change_the_base_are_exported_at_twice_the_rank(base, init, tmp_path):
    _, _, run, _ = base
    tree = perturb(started(base, init))
    peft_jax.save_adapter(tmp_path / "a", tree)
    theirs = peft.PeftModel.from_pretrained(torch_model(FAMILIES["llama2"]()), tmp_path / "a")
    assert theirs.peft_config["default"].r == 8
    assert relative_error(torch_logits(theirs.eval(), TOKENS), run(tree, TOKENS)) < 1e-4


def test_starts_from_statistics_follow_their_papers(base):
    """CorDA: the term taken is the best of its rank for the outputs' covariance norm."""
    _, params, _, statistics = base
    c = np.asarray(statistics["covariance"][Q][0], np.float64)
    node = places(started(base, "corda_ipm"))[Q]
    w = np.asarray(places(params)[Q][0], np.float64)
    damped = c + 1e-4 * np.trace(c) / 32 * np.eye(32)
    s = np.linalg.svd(damped @ w, compute_uv=False)
    left = np.linalg.norm(damped @ (w - 2.0 * np.asarray(node.a[0] @ node.b[0], np.float64)))
    assert left == pytest.approx(np.sqrt(np.square(s[4:]).sum()), rel=1e-3)


def test_eva_starts_in_the_components_of_pefts_incremental_pca(base):
    """Which are about the mean of the inputs; without it the last of them would lie elsewhere."""
    model, inputs = torch_model(FAMILIES["llama2"]()), {}
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_pre_hook(
            lambda _, x, i=i: inputs.update({i: x[0].reshape(-1, 32)})
        )
    torch_logits(model, TOKENS)
    node = places(started(base, "eva"))[Q]
    plain = np.linalg.eigh(np.asarray(base[3]["covariance"][Q], np.float64))[1][..., -4:]
    for i, x in inputs.items():
        components = IncrementalPCA(n_components=4, lowrank=False).fit(x).components_.numpy()

        def cosines(a, of=components):
            return np.linalg.svd(of @ np.asarray(a), compute_uv=False)

        assert cosines(node.a[i]).min() > 0.9999
        assert i or cosines(plain[i]).min() < 0.99
    assert not node.b.any()


@pytest.mark.filterwarnings("ignore")
def test_lora_ga_starts_in_pefts_directions_at_the_authors_size(base):
    """The authors' code (Outsider565/LoRA-GA, direction ArB2r, scale stable) multiplies both by
    out^(1/4) / sqrt(gamma), whatever alpha is; PEFT has the same directions.
    """
    statistics = base[3]["gradient"]
    model = torch_model(FAMILIES["llama2"]())
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj._peft_loraga_grad = torch.tensor(np.asarray(statistics[Q][i]).T)
    ga = peft.LoraGAConfig(direction="ArB2r", scale="stable")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="lora_ga", lora_ga_config=ga
    )
    theirs = peft.get_peft_model(model, config).base_model.model.model.layers
    node = places(started(base, "lora_ga"))[Q]
    for i, layer in enumerate(theirs):

        def of(m):
            return m["default"].weight.detach().numpy().T

        for ours, other in (
            (node.a[i], of(layer.self_attn.q_proj.lora_A)),
            (node.b[i].T, of(layer.self_attn.q_proj.lora_B).T),
        ):
            np.testing.assert_allclose(np.linalg.norm(ours, axis=0), 32**0.25 / 4, rtol=1e-5)
            cosines = (
                np.abs((np.asarray(ours) * other).sum(0))
                / np.linalg.norm(ours, axis=0)
                / np.linalg.norm(other, axis=0)
            )
            assert cosines.min() > 0.999


def test_layers_are_chosen_one_by_one_in_a_stacked_tree(base):
    model, params, run, _ = base
    some = perturb(
        peft_jax.lora(
            params,
            jax.random.key(0),
            rank=2,
            targets=["q_proj", "layers.1.mlp.up_proj"],
            layers=[0, 1],
        )
    )
    delta = jnp.abs(
        peft_jax.merge(some)["model"]["layers"]["self_attn"]["q_proj"]["kernel"] - places(params)[Q]
    )
    np.testing.assert_array_equal(delta.max((1, 2)) > 0, [True, True, False])
    up = "model/layers/mlp/up_proj/kernel"
    delta = jnp.abs(places(peft_jax.merge(some))[up] - places(params)[up])
    np.testing.assert_array_equal(delta.max((1, 2)) > 0, [False, True, False])
    with pytest.raises(ValueError, match="there is no layer 7; layers here: 0 to 2"):
        peft_jax.lora(params, jax.random.key(0), layers=[7])
    ranks = peft_jax.lora(
        params,
        jax.random.key(0),
        rank=2,
        targets="q_proj",
        rank_pattern={"layers.2.self_attn.q_proj": 4},
    )
    used = jnp.abs(places(ranks)[Q].a).max(1) > 0
    np.testing.assert_array_equal(used.sum(-1), [2, 2, 4])


@pytest.mark.parametrize("init", ["kaiming", *STARTS])
def test_layers_of_different_ranks_start_as_if_alone(base, init):
    """Of a stack with ranks 2, 2 and 4: what is drawn has each layer's own deviation, what is
    computed its own directions.
    """
    model, params, run, statistics = base
    given = {"statistics": statistics[NEEDS[init]]} if init in NEEDS else {}
    options = {"targets": "q_proj", "alpha": 8, "init": init, **given}
    tree = peft_jax.lora(
        params, jax.random.key(0), rank=2, rank_pattern={"layers.2.self_attn.q_proj": 4}, **options
    )
    assert relative_error(run(tree, TOKENS), run(params, TOKENS)) < 1e-5
    node, alone = (
        places(tree)[Q],
        places(peft_jax.lora(params, jax.random.key(0), rank=2, **options))[Q],
    )
    np.testing.assert_array_equal(node.a[:2, :, 2:], 0)
    if init in ("kaiming", "gaussian", "orthogonal", "pissa_niter_4"):
        assert float(node.a[:2, :, :2].std()) == pytest.approx(float(alone.a[:2].std()), rel=0.3)
    else:
        np.testing.assert_allclose((node.a @ node.b)[:2], (alone.a @ alone.b)[:2], atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_an_embedding_starts_as_in_peft(base, init):
    """A is zero and B normal, so that a row of A moves at the first step: for LoRA, DoRA and
    HiRA.
    """
    _, params, _, _ = base
    start = {"kaiming": True}.get(init, init)
    config = peft.LoraConfig(r=8, target_modules=["embed_tokens"], init_lora_weights=start)
    layer = peft.get_peft_model(
        torch_model(FAMILIES["llama2"]()), config
    ).base_model.model.model.embed_tokens
    a, b = (getattr(layer, f"lora_embedding_{n}")["default"].detach().numpy() for n in "AB")
    assert np.abs(a).max() == 0
    nodes = {
        method: places(METHODS[method](params, jax.random.key(0), rank=8, targets="embed_tokens"))
        for method in ("lora", "dora", "hira")
    }
    nodes["lora"] = places(
        peft_jax.lora(params, jax.random.key(0), rank=8, targets="embed_tokens", init=init)
    )
    for method, found in nodes.items():
        node = found["model/embed_tokens/embedding"]
        assert float(jnp.abs(node.a).max()) == 0, method
        assert float(node.b.std()) == pytest.approx(b.std(), rel=0.15), method


def test_loha_of_different_ranks_starts_as_if_alone(base):
    _, params, _, _ = base
    options = {"rank": 2, "targets": "q_proj", "rank_pattern": {"layers.2.self_attn.q_proj": 32}}
    node = places(loha(params, jax.random.key(0), **options))[Q]
    assert float(jnp.abs(node.b1[:2]).max()) == pytest.approx(
        2**-0.5, rel=0.1
    )  # uniform within 1 / sqrt(rank)
    assert float(jnp.abs(node.b1[2]).max()) == pytest.approx(32**-0.5, rel=0.1)


@pytest.mark.parametrize("method", ["fourierft", "waveft"])
def test_stacked_layers_have_one_number_of_frequencies(base, method):
    _, params, _, _ = base
    options = {
        "frequencies": 8,
        "targets": "q_proj",
        "frequencies_pattern": {"layers.2.self_attn.q_proj": 12},
    }
    with pytest.raises(
        ValueError,
        match="stacked at model/layers/self_attn/q_proj/kernel 8 and 12; unstack_layers first",
    ):
        METHODS[method](params, jax.random.key(0), **options)


def test_lora_plus_speeds_b_up(base):
    _, params, _, _ = base
    trainable, _ = peft_jax.partition(
        peft_jax.lora(params, jax.random.key(0), rank=2, targets="q_proj")
    )
    grads = jax.tree.map(jnp.ones_like, trainable)
    optimizer = optax.chain(optax.sgd(0.1), lora_plus(16.0))
    updates, _ = optimizer.update(grads, optimizer.init(trainable), trainable)
    node = places(updates)[Q]
    np.testing.assert_allclose(node.a, -0.1)
    np.testing.assert_allclose(node.b, -1.6)


@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_adalora_spends_its_budget_on_what_matters(base, layers):
    """The share of triplets left follows equation 12, and the ones left are those with large
    gradients; layers left out take no part.
    """
    _, params, _, _ = base
    options = {"init_rank": 4, "target_rank": 1, "targets": "q_proj", "layers": layers}
    trainable, frozen = peft_jax.partition(perturb(adalora(params, jax.random.key(0), **options)))
    there = np.asarray([layers is None or i in layers for i in range(3)])
    optimizer = adalora_budget(20, init_rank=4, target_rank=1, warmup=2, final=5)
    state = optimizer.init(trainable)
    node = places(trainable)[Q]
    importance = jnp.asarray([[4.0, 1.0, 2.0, 3.0]] * 3) * there[:, None]  # by triplet
    grads = jax.tree.map(jnp.zeros_like, trainable)
    grads["model"]["layers"]["self_attn"]["q_proj"]["kernel"] = node.replace(
        a=jnp.zeros_like(node.a),
        b=jnp.zeros_like(node.b),
        e=importance / jnp.abs(node.e),
        base=None,
        scale=None,
        gate=None,
    )
    kept = []
    for _ in range(20):
        updates, state = optimizer.update(
            jax.tree.map(jnp.zeros_like, trainable), state, trainable, grads=grads, frozen=frozen
        )
        trainable = optax.apply_updates(trainable, updates)
        kept.append(int((places(trainable)[Q].e[there] != 0).sum()))
    assert kept[1] == 4 * there.sum()
    assert kept[-1] == there.sum()
    assert kept == sorted(kept, reverse=True)
    np.testing.assert_array_equal(
        places(trainable)[Q].e[there] != 0, [[True, False, False, False]] * there.sum()
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_adaloras_penalty_is_pefts(base, layers, tmp_path):
    """The mean over the factors of all adapted layers, which PEFT adds to the loss."""
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        target_modules=["q_proj", "up_proj"],
        total_step=10,
        layers_to_transform=layers,
        orth_reg_weight=0.5,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(torch_model(FAMILIES["llama2"]()), config)
    tokens = torch.tensor(TOKENS).long()
    with torch.no_grad():
        whole = float(theirs(input_ids=tokens, labels=tokens).loss)
        theirs.peft_config["default"].orth_reg_weight = 1e-30
        plain = float(theirs(input_ids=tokens, labels=tokens).loss)
        theirs.peft_config["default"].orth_reg_weight = 0.5
    theirs.save_pretrained(tmp_path)
    assert float(penalty(peft_jax.load_adapter(base[1], tmp_path))) == pytest.approx(
        whole - plain, rel=1e-4
    )


@pytest.mark.filterwarnings("ignore")
def test_adalora_folders_with_ranks_left_out_are_pefts(base, tmp_path):
    """PEFT divides by the initial rank, however many ranks are kept."""
    _, params, run, _ = base
    config = peft.AdaLoraConfig(
        init_r=6, target_r=3, lora_alpha=8, target_modules=["q_proj"], total_step=10
    )
    theirs = peft.get_peft_model(torch_model(FAMILIES["llama2"]()), config)
    kept, torch_draw = {}, torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_E" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch_draw))
                kept[name.removeprefix("base_model.model.")] = [True, False] * 3
    theirs.peft_config["default"].rank_pattern = kept
    theirs.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(torch_model(FAMILIES["llama2"]()), tmp_path)
    expected = torch_logits(again.eval(), TOKENS)
    tree = peft_jax.load_adapter(params, tmp_path)
    assert places(tree)[Q].e.shape == (3, 3)
    assert relative_error(run(tree, TOKENS), expected) < 1e-4
    peft_jax.save_adapter(tmp_path / "ours", tree)
    back = peft.PeftModel.from_pretrained(torch_model(FAMILIES["llama2"]()), tmp_path / "ours")
    assert relative_error(torch_logits(back.eval(), TOKENS), expected) < 1e-4


def test_bad_starts_are_refused_by_name(base):
    _, params, _, statistics = base
    with pytest.raises(ValueError, match="init must be one of kaiming"):
        peft_jax.lora(params, jax.random.key(0), init="pizza")
    with pytest.raises(ValueError, match="init 'eva' needs statistics"):
        peft_jax.lora(params, jax.random.key(0), init="eva")
    with pytest.raises(ValueError, match="init 'orthogonal' needs an even rank, got 3"):
        peft_jax.lora(params, jax.random.key(0), init="orthogonal", rank=3)
    with pytest.raises(ValueError, match="needs a rank of at most 32"):
        peft_jax.lora(params, jax.random.key(0), init="pissa", rank=64)
    with pytest.raises(ValueError, match=r"block_size=5 does not divide the \d+ inputs"):
        oft(params, jax.random.key(0), block_size=5)
    with pytest.raises(ValueError, match="ids must lie between 0 and"):
        trainable_tokens(params, jax.random.key(0), ids=[10**6])
