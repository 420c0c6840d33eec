"""What every method must satisfy, on models it has never seen and on the decoder. A registered
method is tested by itself.

Each case is (model, method); the properties are those of docs/architecture.md.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import peft_jax
from peft_jax.core import Weight, layout_of, matmul, nnx_params, places, unmerge
from peft_jax.core.mesh import make_mesh
from peft_jax.core.method import Method
from peft_jax.core.prepare import distribute
from peft_jax.core.sharding import shard
from peft_jax.methods import METHODS
from peft_jax.models.layers import stack_layers, unstack_layers
from peft_jax.quantization import NF4, Int
from tests.reference import family_checkpoint, perturb, random_tokens, relative_error
from tests.third_party import VOCAB, WIDTH, ListedModel, VisionModel, linen_model, nnx_model

# Where a method stands in a model of unknown modules, by its name or by what it changes.
ELSEWHERE: dict[str, dict[str, Any]] = {
    "rows": {"targets": "embed"},
    "modules": {"targets": "blocks"},
    "bottleneck": {"targets": ["blocks", "out"]},
    "ia3": {"targets": ["up", "down", "query"], "feedforward": "down"},
}


def compressed(params):
    """The base with its feed-forward masked, one weight of it quantized first and one afterwards,
    and the rest quantized.
    """
    params = peft_jax.prune(params, 0.5, targets=["gate_proj", "down_proj"])
    formats = {
        "*/self_attn/*": NF4(block_size=16),
        "embed_tokens": "int8",
        "lm_head": Int(bits=4, block_size=8),
        "*/mlp/*": "int8",
    }
    params = peft_jax.quantize(
        params,
        formats,
        targets=["*/self_attn/*", "embed_tokens", "lm_head", "up_proj", "down_proj"],
    )
    return peft_jax.prune(params, 0.5, targets="up_proj")


MODELS = ["linen", "nnx", "compressed", "scanned", "looped", "gemma2"]
MESHES = [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}, {"fsdp": 8}]
THOROUGH = ("lora", "full")  # the others meet the first three models and the first mesh
REMATERIALISED = (
    *THOROUGH,
    "bottleneck",
    "prefix_tuning",
)  # a property of the binding more than of a method


def models_of(name):
    """The models that a method meets."""
    if name in THOROUGH:
        return MODELS
    third = "scanned" if METHODS[name].whole else "compressed"
    return [*MODELS[:2], "biased" if name == "bitfit" else third]


CASES = [(m, n) for n in METHODS for m in models_of(n)]


class Base(NamedTuple):
    model: Any
    params: Any
    layout: Any  # of the weights, where the model is not one of this package
    tokens: np.ndarray
    apply: Any
    logits: Any


@dataclasses.dataclass
class Case:
    base: Base
    method: Method
    params: Any  # with the method, as it starts
    moved: Any  # with every trained array moved
    apply: Any  # of its own: what it has compiled goes with the case

    @property
    def model(self) -> Any:
        return self.base.model

    @property
    def tokens(self) -> np.ndarray:
        return self.base.tokens

    @functools.cached_property
    def logits(self) -> Any:
        return self.apply(self.moved, self.tokens)

    @functools.cached_property
    def gradients(self) -> Any:
        trainable, frozen = peft_jax.partition(self.moved)
        return jax.jit(jax.grad(lambda t: loss(self.apply, t, frozen, self.tokens)))(trainable)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("matrix")


@functools.cache
def base_model(name: str, root: Path) -> Base:
    layout, tokens = None, random_tokens(2, 8, vocab=VOCAB)
    if name in ("linen", "nnx"):
        model, params = linen_model() if name == "linen" else nnx_model()
        layout = layout_of(model, tokens)
    else:
        family = {"gemma2": "gemma2_caps", "biased": "llama3_tied_biased"}.get(name, "llama2")
        folder, tokens, _ = family_checkpoint(family, root)
        model, params = peft_jax.load(folder, scan_layers=name != "looped")
        params = compressed(params) if name == "compressed" else params
    apply = jax.jit(peft_jax.bind(model))
    return Base(model, params, layout, tokens, apply, apply(params, tokens))


@pytest.fixture(scope="module", params=CASES, ids=lambda p: f"{p[1]}-{p[0]}")
def case(request, root):
    name, method = request.param
    base = base_model(name, root)
    method = METHODS[method]
    options = dict(method.example)
    if base.layout is not None:
        options |= elsewhere(method) | layout_for(method, base.layout)
    if base.layout is not None and not method.anywhere:
        pytest.skip("it needs a model of this package")
    params = method(base.params, jax.random.key(1), **options)
    return Case(base, method, params, perturb(params), jax.jit(peft_jax.bind(base.model)))


def elsewhere(method, among=None):
    """What a method is told in a model of unknown modules."""
    known = ELSEWHERE | (among or {})
    return known.get(method.name, known.get(method.at, {}))


def layout_for(method, layout):
    """The layout of a model's weights, where the method takes one."""
    return {"layout": layout} if "layout" in method.options else {}


def is_compressed(base: Base) -> bool:
    return any(isinstance(w, Weight) for w in places(base.params).values())


def once(case):
    """Skip what one model shows as well as three, for methods that are not gone through
    thoroughly.
    """
    if case.method.name not in THOROUGH and not hasattr(case.model, "config"):
        pytest.skip("one model will do")


def loss(apply, trainable, frozen, tokens):
    return (apply(peft_jax.combine(trainable, frozen), tokens) ** 2).mean()


def test_identity_at_the_start(case):
    if not case.method.identity:
        pytest.skip("this method does not promise it")
    assert relative_error(case.apply(case.params, case.tokens), case.base.logits) < 1e-5


def test_gradients_reach_every_trained_array_and_no_other(case):
    largest = jax.tree.map(lambda g: float(jnp.abs(g).max()), case.gradients)
    for path, value in jax.tree_util.tree_flatten_with_path(largest)[0]:
        assert np.isfinite(value), path
        # a key's bias shifts all scores of a query alike: softmax does not see it
        assert value > 1e-12 or "key" in jax.tree_util.keystr(path), path
    assert jax.tree.structure(case.gradients) == jax.tree.structure(
        peft_jax.partition(case.moved)[0]
    )


def test_merged_equals_unmerged(case):
    assert (
        relative_error(case.base.apply(peft_jax.merge(case.moved), case.tokens), case.logits) < 2e-5
    )


def test_unmerge_restores(case):
    if (not case.method.identity and case.method.whole) or is_compressed(case.base):
        pytest.skip("a compressed base is not recovered from its merge with a dense update")
    back = unmerge(peft_jax.merge(case.moved), case.moved)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(case.moved), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_matmul_equals_materialized(case):
    for path, w in places(distribute(case.moved)).items():
        if not isinstance(w, Weight) or not path.endswith("kernel") or not hasattr(w, "in_axes"):
            continue
        while w.ndim > len(w.in_axes) + len(w.out_axes):
            w = jax.tree.map(lambda a: a[0], w)
        x = jax.random.normal(jax.random.key(0), (3, *(w.shape[a] for a in w.in_axes)))
        axes = {"in_axes": w.in_axes, "out_axes": w.out_axes}
        expected = matmul(x, w.materialize(), **axes)
        assert relative_error(matmul(x, w, **axes), expected) < 1e-5


def test_eager_equals_jitted(case):
    once(case)
    assert relative_error(peft_jax.bind(case.model)(case.moved, case.tokens), case.logits) < 1e-5


def test_scanned_equals_looped(case):
    if not getattr(case.model, "scan_layers", False):
        pytest.skip("the model does not scan its layers by a switch")
    looped = case.model.clone(scan_layers=False)
    tree = unstack_layers(case.moved)
    assert relative_error(jax.jit(peft_jax.bind(looped))(tree, case.tokens), case.logits) < 1e-5
    assert jax.tree.structure(stack_layers(tree)) == jax.tree.structure(case.moved)


def test_rematerialised_equals_not(case):
    if not hasattr(case.model, "remat") or case.method.name not in REMATERIALISED:
        pytest.skip("the model does not rematerialise by a switch")
    apply = peft_jax.bind(case.model.clone(remat="full"))
    trainable, frozen = peft_jax.partition(case.moved)
    again = jax.jit(jax.grad(lambda t: loss(apply, t, frozen, case.tokens)))(trainable)
    for a, b in zip(jax.tree.leaves(case.gradients), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_eight_devices_equal_one(case, axes):
    if case.method.name not in THOROUGH and (
        axes is not MESHES[0] or not hasattr(case.model, "config")
    ):
        pytest.skip("one mesh and one model will do")
    mesh = make_mesh(axes)
    placed = shard(case.moved, mesh)
    tokens = np.tile(case.tokens, (4, 1))
    with jax.set_mesh(mesh):
        spread = jax.device_put(tokens, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
        out = np.asarray(jax.jit(peft_jax.bind(case.model))(placed, spread))
    assert relative_error(out, np.tile(case.logits, (4, 1, 1))) < 2e-5


def test_bfloat16_stays_close(case):
    if not isinstance(case.model, nn.Module) or not hasattr(case.model, "dtype"):
        pytest.skip("the model has no dtype to change")
    half = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, case.moved
    )
    out = jax.jit(peft_jax.bind(case.model.clone(dtype=jnp.bfloat16)))(half, case.tokens)
    assert float(jnp.abs(out - case.logits).mean() / jnp.abs(case.logits).mean()) < 0.1


def test_orbax_round_trip(case, tmp_path):
    once(case)
    import orbax.checkpoint as ocp

    trainable, frozen = peft_jax.partition(case.moved)
    with ocp.StandardCheckpointer() as checkpointer:
        flat = dict(enumerate(jax.tree.leaves(trainable)))
        checkpointer.save(tmp_path / "state", {str(k): v for k, v in flat.items()})
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "state")
    leaves = [
        np.asarray(back[str(i)]) for i in range(len(flat))
    ]  # free of a device, so that nothing is compiled again
    restored = peft_jax.combine(jax.tree.unflatten(jax.tree.structure(trainable), leaves), frozen)
    np.testing.assert_array_equal(case.apply(restored, case.tokens), case.logits)


def test_export_round_trip(case, tmp_path):
    """An adapter through its PEFT folder, full fine-tuning through a Hugging Face folder: the same
    output.
    """
    if not hasattr(case.model, "config"):
        pytest.skip("only Hugging Face families have a folder format")
    if case.method.whole:
        if is_compressed(case.base):
            pytest.skip("full fine-tuning leaves a compressed base as it is")
        peft_jax.save(tmp_path / "model", case.model, peft_jax.merge(case.moved))
        _, params = peft_jax.load(tmp_path / "model", scan_layers=case.model.scan_layers)
    else:
        peft_jax.save_adapter(tmp_path / "adapter", case.moved)
        params = peft_jax.load_adapter(case.base.params, tmp_path / "adapter")
    assert relative_error(case.apply(params, case.tokens), case.logits) < 1e-6


# NNX models whose trees have lists, run without compiling them as a whole; methods that need tokens
# or a decoder's attention stay away from images.
IN_LISTS = {
    "rows": {"targets": "embedder"},
    "modules": {"targets": "layers"},
    "bottleneck": {"targets": "layers"},
}
ON_IMAGES = {n: {"width": WIDTH} for n in ("bottleneck", "compacter", "reft")}
LISTED = [n for n in METHODS if METHODS[n].anywhere]
SEEN = (
    "lora",
    "bottleneck",
    "ia3",
    "reft",
    "bitfit",
    "full",
)  # one for each way into a tree; the others are slow together
QUICK = (*SEEN, "trainable_tokens", "cpt", "prefix_tuning", "invertible")
IN_LISTED = [
    pytest.param("listed", n, marks=() if n in QUICK else pytest.mark.slow) for n in LISTED
]


@functools.cache
def listed_model(kind: str) -> Base:
    model = (ListedModel if kind == "listed" else VisionModel)(nnx.Rngs(0))
    given = (
        random_tokens(2, 4, vocab=VOCAB)
        if kind == "listed"
        else jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    )
    params, apply = nnx_params(model), peft_jax.bind(model)
    return Base(model, params, layout_of(model), given, apply, apply(params, given))


@pytest.mark.parametrize(("kind", "method"), IN_LISTED + [("images", n) for n in SEEN])
def test_models_with_lists_of_modules(kind, method):
    base, method = listed_model(kind), METHODS[method]
    options = (
        dict(method.example)
        | elsewhere(method, IN_LISTS)
        | (ON_IMAGES.get(method.name, {}) if kind == "images" else {})
    )
    layout = layout_for(method, base.layout)
    params = method(base.params, jax.random.key(1), **options, **layout)
    if method.identity:
        assert relative_error(base.apply(params, base.tokens), base.logits) < 1e-5
    moved = perturb(params)
    logits = base.apply(moved, base.tokens)
    assert relative_error(logits, base.logits) > 1e-4
    assert relative_error(base.apply(peft_jax.merge(moved), base.tokens), logits) < 2e-5
