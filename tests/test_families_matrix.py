"""Every family against its reference, what it says of its modules, and techniques on every kind of
model: identity at the start, gradients, merging, a quantized and a pruned base.

The method matrix holds each method to its properties on decoders and third-party models; this holds
each family to them with a method of every kind. Families whose modules have the same roles are one
kind. Those of `docs/examples` are held to it as any other.
"""

import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as tr
from safetensors.numpy import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import peft_jax
from peft_jax.adapters import (
    adaption_prompt,
    bottleneck,
    ia3,
    ln_tuning,
    prefix_tuning,
    prompt_tuning,
    unipelt,
)
from peft_jax.core import full, materialize
from peft_jax.core.placing import modules_with_roles, token_stack
from peft_jax.core.roles import FAMILIES, hooks_of
from peft_jax.hub.peft.prefix_tuning import prefix_places
from peft_jax.knowledge.hooks import feed_forward
from peft_jax.low_rank import dora, trainable_tokens
from peft_jax.models.blocks import abstract_params
from peft_jax.models.families import hf_class, register_family
from peft_jax.pruning import Masked, mask_updates, prune_structured
from peft_jax.quantization import Int, dequantize
from tests.reference import perturb, random_tokens, relative_error

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def example(path):
    """The family of one of the example files; None where it is about something else."""
    if "FAMILY = " not in path.read_text(encoding="utf-8"):
        return None
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FAMILY


STRANGERS = [family for family in map(example, sorted(EXAMPLES.glob("*.py"))) if family]
RECORDS = {f.name: f for f in [*FAMILIES.values(), *STRANGERS]}


@pytest.fixture(scope="module", autouse=True)
def strangers():
    """The examples' families, known while this file runs."""
    for family in STRANGERS:
        register_family(family)
    yield
    for family in STRANGERS:
        del FAMILIES._records[family.name]


def their_config(record):
    name = record.like or record.name
    assert name in CONFIG_MAPPING, f"{name} has no reference: say `like`"
    assert record.example, f"{name} has no example"
    return CONFIG_MAPPING[name](**record.example)


def our_tree(record, task):
    """The shapes of a family's example."""
    config = their_config(record)
    return abstract_params(record.module(record.config(config), task=task))


def their_model(record, task, folder):
    """PyTorch's model of a family's example with a head for the task, in a folder as the family's
    checkpoints are.
    """
    torch.manual_seed(0)
    classes = {"gpt2": tr.GPT2LMHeadModel} if task == "causal_lm" else {}
    cls = classes.get(record.name) or getattr(tr, hf_class(record.like or record.name, task))
    model = cls._from_config(their_config(record), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    if record.like:
        tensors = load_file(folder / "model.safetensors")
        for pattern, new in record.like_names:
            tensors = {re.sub(pattern, new, name): x for name, x in tensors.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": record.name}))
    return model


KEY = jax.random.key(0)
TOKENS, TARGETS = random_tokens(2, 10), random_tokens(2, 6, seed=1)


@pytest.mark.parametrize("name", RECORDS)
def test_a_family_computes_what_its_reference_does(name, tmp_path):
    record = RECORDS[name]
    task = record.tasks[0]
    theirs = their_model(record, task, tmp_path)
    more = {"decoder_input_ids": torch.tensor(TARGETS)} if task == "seq2seq_lm" else {}
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS), **more).logits.numpy()
    model, params = peft_jax.load(tmp_path, scan_layers=False)
    ours = model.apply({"params": params}, TOKENS, *([TARGETS] if more else []))
    assert relative_error(ours, expected) < 2e-5


@pytest.mark.parametrize("name", RECORDS)
def test_a_family_says_what_its_modules_are(name):
    record = RECORDS[name]
    for task in record.tasks:
        tree = our_tree(record, task)
        for path, w in peft_jax.core.places(tree).items():
            module, _, leaf = path.rpartition("/")
            if leaf in ("kernel", "scale") or "experts" in module:
                assert record.roles.role_of(module), f"{module} has no role"
                assert leaf == "scale" or w.ndim > 1
        assert f"{record.embedding}/embedding" in peft_jax.core.places(tree)
        assert token_stack(tree) == (record.roles.kind, record.prefix)
        found = modules_with_roles(tree)
        wanted = ("stack", "attention", "core", "o", "attention_residual", "mlp_residual")
        assert set(wanted) <= set(found)
        assert {"down", "experts"} & set(found)
        for core in found["core"]:
            attention = core.rpartition("/")[0]
            names = {p.rpartition("/")[2] for p in found.get("q", found.get("qkv"))}
            assert core.rpartition("/")[2] in hooks_of(attention, names)


DEFAULTS = {
    "ia3": lambda p: ia3(p, KEY),
    "unipelt": lambda p: unipelt(p, KEY, rank=2, num_virtual_tokens=3),
    "trainable_tokens": lambda p: trainable_tokens(p, KEY, ids=[5, 7]),
    "houlsby": lambda p: bottleneck(p, KEY, placement="houlsby", size=3),
}


@pytest.mark.parametrize("name", RECORDS)
def test_places_by_default_are_there_in_every_family(name):
    tree = our_tree(RECORDS[name], RECORDS[name].tasks[0])
    before = len(jax.tree.leaves(tree))
    for method in DEFAULTS.values():
        assert len(jax.tree.leaves(jax.eval_shape(method, tree))) > before


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """name -> (model, params) of Llama and of Walnut, which has the same weights."""
    root, found = tmp_path_factory.mktemp("twins"), {}
    for name in ("llama", "walnut"):
        record = RECORDS[name]
        their_model(record, "causal_lm", root / name)
        found[name] = peft_jax.load(root / name)
    return found


def test_techniques_ask_for_roles_and_not_for_names(twins):
    """What Llama's modules get, those of Walnut get, which has other names for all of them."""
    outputs, places = {}, {}
    for name, (model, params) in twins.items():
        smaller = prune_structured(
            model, params, (), layers=1, kv_heads=1, units=32, channels=16, score="magnitude"
        )
        prompted = perturb(adaption_prompt(smaller[1], KEY, adapter_len=3))
        outputs[name] = jax.jit(peft_jax.bind(smaller[0]))(prompted, TOKENS)
        found = feed_forward(params)
        places[name] = (found.attention, found.weight, found.residual, prefix_places(params)[0])
    assert relative_error(outputs["walnut"], outputs["llama"]) < 1e-6
    assert places["walnut"] == (
        "model/layers/mixer",
        "model/layers/feed_forward/w2/kernel",
        "model/layers/after_feed_forward",
        ("model/layers/0/mixer/attend", 0),
    )


# Roles that tell kinds of models apart.
PLACED = ("q", "qkv", "gate", "gate_up", "experts", "relative", "attention_output")


def kinds():
    """One family of each kind."""
    found = {}
    for record in RECORDS.values():
        tree = our_tree(record, record.tasks[0])
        roles = frozenset(modules_with_roles(tree)) & set(PLACED)
        found.setdefault((record.roles.name, roles), record.name)
    return list(found.values())


KINDS = kinds()
FEW = ("bert", "t5", "mixtral", "walnut")
METHODS = {
    "lora": lambda p, k: peft_jax.lora(p, k, rank=2),
    "dora": lambda p, k: dora(p, k, rank=2),
    "ia3": lambda p, k: ia3(p, k),
    "houlsby": lambda p, k: bottleneck(p, k, placement="houlsby", size=3),
    "pfeiffer": lambda p, k: bottleneck(p, k, placement="pfeiffer", size=3),
    "prefix_tuning": lambda p, k: prefix_tuning(p, k, num_virtual_tokens=3),
    "prompt_tuning": lambda p, k: prompt_tuning(p, k, num_virtual_tokens=3),
    "ln_tuning": lambda p, k: ln_tuning(p),
    "full": lambda p, k: full(p),
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
        record = RECORDS[kind]
        task = record.tasks[0] if record.roles.kind != "encoder" else "token_classification"
        their_model(record, task, root / kind)
        model, params = peft_jax.load(root / kind)
        more = [TARGETS] if task == "seq2seq_lm" else []
        apply = peft_jax.bind(model, strict=True)
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
    small = peft_jax.quantize(base, Int(bits=8, block_size=4), targets="all-linear")
    assert relative_error(run(small), run(dequantize(small))) < 1e-5
    assert relative_error(run(small), run(base)) < 0.2
    zeros = peft_jax.prune(base, 0.5, targets="all-linear")
    over = perturb(peft_jax.lora(small, jax.random.key(0), rank=2))
    _, out = gradient(*peft_jax.partition(over))
    assert relative_error(run(peft_jax.merge(over)), out) < 5e-5
    kept = peft_jax.merge(perturb(mask_updates(peft_jax.lora(zeros, jax.random.key(0), rank=2))))

    def zero(w):
        return np.asarray(materialize(w)) == 0

    def gone(tree):
        return {p: zero(w) for p, w in peft_jax.core.places(tree).items() if hasattr(w, "shape")}

    before, after = gone(zeros), gone(kept)
    pruned = [p for p, w in peft_jax.core.places(zeros).items() if isinstance(w, Masked)]
    assert pruned
    for path in pruned:
        assert before[path].mean() == pytest.approx(0.5, abs=0.02)
        np.testing.assert_array_equal(after[path], before[path])
