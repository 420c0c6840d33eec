"""What the optimizers make of a tree: what decays, and stacked layers that are no other than looped
ones.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers as tr
from safetensors.numpy import load_file

import peft_jax
from peft_jax.core import full
from peft_jax.core.mesh import make_mesh
from peft_jax.core.select import layer_axes
from peft_jax.core.sharding import shard
from peft_jax.core.tree import places
from peft_jax.low_rank.dora import DoRA
from peft_jax.methods import METHODS
from peft_jax.models.layers import unstack_layers
from peft_jax.objectives.tokens import next_token
from peft_jax.training.checkpoint import Checkpoints
from peft_jax.training.config import OptimizerConfig
from peft_jax.training.loop import initial_state
from peft_jax.training.optimizer import decay_mask, make_optimizer
from tests.models.test_encoders import ENCODERS, T5_SIZES
from tests.reference import FAMILIES, family_checkpoint, random_tokens, relative_error, torch_model

BIASED = "llama3_tied_biased"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of a Llama with biases, the model and its tree, with layers stacked."""
    folder, *_ = family_checkpoint(BIASED, tmp_path_factory.mktemp("base"))
    return folder, *peft_jax.load(folder)


def decayed(params, no_decay=None):
    """The numbers of trained parameters that decay and that do not."""
    trainable = peft_jax.partition(params)[0]
    mask = jax.tree.leaves(decay_mask(trainable, no_decay))
    sizes = [a.size for a in jax.tree.leaves(trainable)]
    yes = sum(n for n, decays in zip(sizes, mask, strict=True) if decays)
    return yes, sum(sizes) - yes


def theirs_decayed(model):
    """The same by transformers' Trainer."""
    names = set(tr.Trainer.get_decay_parameter_names(None, model))
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    yes = sum(n for name, n in trained.items() if name in names)
    return yes, sum(trained.values()) - yes


def groups(model, weight_decay):
    """The Trainer's groups of parameters."""
    names = set(tr.Trainer.get_decay_parameter_names(None, model))
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in trained if n in names], "weight_decay": weight_decay},
        {"params": [p for n, p in trained if n not in names], "weight_decay": 0.0},
    ]


EPS = 1e-5  # far above the rounding of gradients that are next to nothing, which Adam would blow up
COMMON = dict(task_type="CAUSAL_LM")
TARGETS = ["q_proj", "v_proj", "up_proj"]
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **COMMON),
    "dora": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS, use_dora=True, **COMMON
    ),
    "bias": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS, bias="all", **COMMON
    ),
    "ia3": lambda: peft.IA3Config(**COMMON),
    "ln_tuning": lambda: peft.LNTuningConfig(**COMMON),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_twenty_steps_with_weight_decay_are_those_of_the_trainer(base, kind, tmp_path):
    """PEFT and torch.optim.AdamW with the Trainer's groups, over stacked layers."""
    _, model, params = base
    theirs = peft.get_peft_model(torch_model(FAMILIES[BIASED]()), ADAPTERS[kind]()).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1 * p.requires_grad)
    theirs.save_pretrained(tmp_path / "start")
    ours = peft_jax.load_adapter(params, tmp_path / "start")
    assert decayed(ours) == theirs_decayed(theirs)

    tokens = random_tokens(4, 17)
    optimizer = torch.optim.AdamW(groups(theirs, 0.5), lr=2e-3, eps=EPS)
    for _ in range(20):
        optimizer.zero_grad()
        logits = theirs(torch.tensor(tokens[:, :-1])).logits
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.tensor(tokens[:, 1:]).long().flatten()
        ).backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path / "theirs")

    options = OptimizerConfig(
        learning_rate=2e-3,
        weight_decay=0.5,
        eps=EPS,
        schedule="constant",
        warmup_steps=0,
        clip_norm=0,
    )
    peft_jax.save_adapter(
        tmp_path / "ours", steps(model, ours, tokens, make_optimizer(options, 20), 20)
    )
    found, wanted = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")
    )
    assert set(found) == set(wanted)
    assert max(relative_error(found[n], wanted[n]) for n in wanted) < 1e-5


def steps(model, params, tokens, optimizer, count):
    """The tree after this many steps on the same tokens."""
    apply, (trainable, frozen) = peft_jax.bind(model), peft_jax.partition(params)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones(tokens[:, 1:].shape, np.float32),
    }

    def loss(t):
        return next_token(apply, peft_jax.combine(t, frozen), batch, None)[0]

    def one(carry, _):
        t, state = carry
        updates, state = optimizer.update(jax.grad(loss)(t), state, t)
        return (optax.apply_updates(t, updates), state), None

    (trained, _), _ = jax.jit(lambda c: jax.lax.scan(one, c, length=count))(
        (trainable, optimizer.init(trainable))
    )
    return peft_jax.combine(trained, frozen)


MODELS = {
    **{
        name: lambda name=name: tr.AutoModelForCausalLM.from_config(FAMILIES[name]())
        for name in ("gpt2", "qwen2_moe", BIASED)
    },
    **{
        name: lambda name=name: tr.AutoModelForSequenceClassification.from_config(
            ENCODERS[name](num_labels=3)
        )
        for name in ("bert", "distilbert", "deberta_v2")
    },
    "t5": lambda: tr.T5ForConditionalGeneration(tr.T5Config(**T5_SIZES)),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_decays_in_full_fine_tuning_is_what_the_trainer_has(name, tmp_path):
    theirs = MODELS[name]()
    theirs.save_pretrained(tmp_path)
    assert decayed(full(peft_jax.load(tmp_path)[1])) == theirs_decayed(theirs)


def by_name(params):
    """(path without layers' numbers, field) -> whether it decays."""
    mask = jax.tree_util.tree_flatten_with_path(decay_mask(peft_jax.partition(params)[0]))[0]

    def name(path):
        return re.sub(
            r"\blayers_\d+", "layers", jax.tree_util.keystr(path, simple=True, separator="/")
        )

    return {name(path): decays for path, decays in mask}


@pytest.mark.parametrize("method", METHODS)
def test_stacked_layers_decay_as_looped_ones(base, method):
    options = METHODS[method].example

    def make(tree):
        return jax.eval_shape(lambda p: METHODS[method](p, jax.random.key(0), **options), tree)

    stacked, looped = by_name(make(base[2])), by_name(make(jax.eval_shape(unstack_layers, base[2])))
    assert stacked == looped


def test_biases_and_norms_within_adapters_are_spared(base):
    options = {
        "bottleneck": {"size": 3, "ln_before": True},
        "p_tuning": {"num_virtual_tokens": 3},
        "invertible": {},
    }
    for method, more in options.items():
        params = peft_jax.partition(METHODS[method](base[2], jax.random.key(0), **more))[0]
        vectors = jax.tree.map(lambda a, layers: a.ndim - layers == 1, params, layer_axes(params))
        spared = [not decays for decays in jax.tree.leaves(decay_mask(params))]
        assert spared == jax.tree.leaves(vectors), method
        assert set(spared) == {True, False}, method


def test_what_decays_is_set_by_pattern(base):
    params = METHODS["dora"](base[2], jax.random.key(0), rank=2, targets=["q_proj", "up_proj"])
    magnitudes = sum(w.magnitude.size for w in places(params).values() if isinstance(w, DoRA))
    ups = sum(
        a.size for a in jax.tree.leaves(peft_jax.partition(params)[0]["model"]["layers"]["mlp"])
    )
    assert decayed(params)[1] == 0
    assert decayed(params, ["magnitude"])[1] == magnitudes
    assert decayed(params, ["up_proj"])[1] == ups
    assert decayed(full(base[2]), [])[1] == 0
    with pytest.raises(
        ValueError, match=r"optimizer.no_decay: 'magnitud' matches nothing that trains"
    ):
        decayed(params, ["magnitud"])


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor", "galore", "lion"])
def test_an_optimizer_takes_stacked_layers_as_looped_ones(name):
    """Sizes at which second moments are factored, projected and stored in 8 bits."""
    draw = np.random.default_rng(0).normal
    shapes = {
        "up": {"kernel": (3, 160, 130), "bias": (3, 1500)},
        "experts": {"down_proj": (3, 2, 40, 30)},
    }

    def arrays(scale):
        return jax.tree.map(
            lambda s: (
                draw(size=s) * np.arange(1, 4).reshape(3, *[1] * (len(s) - 1)) * scale
            ).astype(np.float32),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )

    params, grads = (
        full({"layers": arrays(1.0)}),
        [full({"layers": arrays(0.1)}) for _ in range(3)],
    )
    config = OptimizerConfig(
        name=name,
        weight_decay=0.1,
        warmup_steps=0,
        schedule="constant",
        galore_rank=8,
        learning_rate=0.1,
    )

    def run(params, grads):
        optimizer, state = make_optimizer(config, 3), None
        for g in grads:
            state = optimizer.init(params) if state is None else state
            updates, state = optimizer.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return params

    stacked = jax.jit(run)(params, grads)
    looped = jax.jit(run)(unstack_layers(params), [unstack_layers(g) for g in grads])
    for i, layer in enumerate(looped[f"layers_{i}"] for i in range(3)):
        for a, b in zip(jax.tree.leaves(stacked["layers"]), jax.tree.leaves(layer), strict=True):
            assert relative_error(a[i], b) < 1e-5


def test_an_axis_is_of_layers_where_all_arrays_of_a_stack_begin_with_it():
    one = {
        "layer": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}
    }  # a module that is only called so
    assert jax.tree.leaves(layer_axes(one)) == [0, 0]
    stack = {
        "h": {"kernel": jnp.ones((3, 4, 6)), "bias": jnp.ones((3, 6))},
        "head": {"kernel": jnp.ones((6, 4))},
    }
    assert layer_axes(stack) == {"h": {"kernel": 1, "bias": 1}, "head": {"kernel": 0}}


OPTIMIZERS = ("adamw", "adamw8bit", "adam", "sgd", "lion", "adafactor", "galore")


def _toy(kind):
    """Stacked and looped matrices, vectors and an embedding, with what trains as LoRA or all of
    it.
    """

    def draw(seed, *shape):
        return jax.random.normal(jax.random.key(seed), shape)

    layers = {
        "q_proj": {"kernel": draw(0, 2, 16, 32)},
        "input_layernorm": {"scale": draw(1, 2, 16)},
    }
    tree = {
        "layers": layers,
        "up": {"kernel": draw(2, 16, 32)},
        "embed_tokens": {"embedding": draw(3, 24, 16)},
    }
    return (
        full(tree)
        if kind == "full"
        else peft_jax.lora(tree, jax.random.key(9), rank=8, targets=["q_proj", "up"])
    )


def _steps(optimizer, params, mesh, count=3):
    """The state after `count` updates by gradients drawn alike."""
    state = initial_state(params if mesh is None else shard(params, mesh), optimizer, 0, mesh)

    @jax.jit
    def step(state, seed):
        counter = iter(range(100))

        def draw(x):
            return jax.random.normal(
                jax.random.fold_in(jax.random.key(seed), next(counter)), x.shape
            )

        grads = jax.tree.map(draw, state.trainable)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable, grads=grads)
        return state._replace(
            trainable=optax.apply_updates(state.trainable, updates), opt_state=opt_state
        )

    for seed in range(count):
        state = step(state, seed)
    return state


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_runs_on_a_mesh_and_is_resumed(name, kind, tmp_path):
    """Eight devices make of every tree what one makes, and a state restored goes on as it was."""
    decay = 0.0 if name in ("adam", "sgd") else 0.1
    config = OptimizerConfig(
        name=name, learning_rate=0.01, warmup_steps=0, weight_decay=decay, galore_rank=4
    )
    params = _toy(kind)
    optimizer = make_optimizer(config, 10)
    alone = _steps(optimizer, params, None)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    spread = _steps(optimizer, params, mesh)
    for a, b in zip(
        jax.tree.leaves(alone.trainable), jax.tree.leaves(spread.trainable), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
    store = Checkpoints(tmp_path / "state", keep=1, identity={})
    store.save(spread._replace(step=jnp.int32(3)), {})
    store.wait()
    restored, _ = store.restore(initial_state(shard(params, mesh), optimizer, 0, mesh))
    store.close()
    for a, b in zip(
        jax.tree.leaves(restored.opt_state), jax.tree.leaves(spread.opt_state), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lion", "adafactor", "galore"])
def test_decay_is_scaled_by_the_rate_and_spares_norms(name):
    """Without gradients a matrix shrinks by (1 - rate * decay)^steps (Loshchilov and Hutter 2019,
    algorithm 2), a norm not.
    """
    config = OptimizerConfig(
        name=name, learning_rate=1e-3, schedule="constant", warmup_steps=0, weight_decay=0.01
    )
    tree = {"up": {"kernel": jnp.ones((16, 32))}, "input_layernorm": {"scale": jnp.ones(16)}}
    params = peft_jax.partition(full(tree))[0]
    optimizer = make_optimizer(config, 100)
    nothing = jax.tree.map(jnp.zeros_like, params)

    def step(_, carry):
        params, state = carry
        updates, state = optimizer.update(nothing, state, params, grads=nothing)
        return optax.apply_updates(params, updates), state

    params, _ = jax.jit(lambda p, s: jax.lax.fori_loop(0, 100, step, (p, s)))(
        params, optimizer.init(params)
    )
    assert relative_error(params["up"]["kernel"].value, np.full((16, 32), (1 - 1e-5) ** 100)) < 1e-5
    assert relative_error(params["input_layernorm"]["scale"].value, np.ones(16)) < 1e-6
