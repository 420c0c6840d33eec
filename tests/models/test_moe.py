"""Mixtures of experts: dropless routing against a dense reference, expert parallelism, the router's
loss, techniques.
"""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P
from transformers import Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import peft_jax
from peft_jax.core import places
from peft_jax.core.calibrate import calibrate
from peft_jax.core.grouped import grouped_matmul, tiled_outer
from peft_jax.core.mesh import make_mesh
from peft_jax.core.sharding import shard
from peft_jax.core.weight import ragged_matmul
from peft_jax.models import routing
from peft_jax.models.blocks import abstract_params
from peft_jax.models.config import decoder_config
from peft_jax.models.decoder import Decoder
from peft_jax.models.moe import load_balancing_loss
from peft_jax.models.routing import mixture
from peft_jax.objectives.tokens import next_token
from peft_jax.pruning import expert_importance, prune_experts, prune_structured, shrink
from peft_jax.pruning.report import Report
from peft_jax.pruning.stage import PruneConfig
from peft_jax.quantization import Int, Quantized, dequantize
from tests.reference import family_checkpoint, perturb, relative_error

N, D, F, E, K = 24, 16, 12, 4, 2
MOES = ["mixtral_sliding", "qwen2_moe"]


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    ids = np.stack([rng.permutation(E)[:K] for _ in range(N)]).astype(np.int32)
    return draw(N, D), ids, np.abs(draw(N, K)), draw(E, D, 2 * F), draw(E, F, D)


def dense(x, ids, weights, gate_up, down):
    """Every expert for every token, in float64, and then the chosen ones."""
    x, weights, gate_up, down = (np.asarray(a, np.float64) for a in (x, weights, gate_up, down))
    hidden = np.einsum("nd,edf->enf", x, gate_up)
    gate, up = np.split(hidden, 2, axis=-1)
    each = np.einsum("enf,efd->end", gate / (1 + np.exp(-gate)) * up, down)
    return sum(
        weights[:, j, None] * each[ids[:, j], np.arange(len(x))] for j in range(ids.shape[1])
    )


def test_dropless_routing_equals_a_dense_reference(arrays):
    out = jax.jit(functools.partial(mixture, activation="silu"))(*arrays)
    assert relative_error(out, dense(*arrays)) < 1e-5


def test_all_tokens_at_one_expert_are_kept(arrays):
    x, _, weights, gate_up, down = arrays
    ids = np.full((N, 1), 2, np.int32)
    out = jax.jit(functools.partial(mixture, activation="silu"))(
        x, ids, weights[:, :1], gate_up, down
    )
    assert relative_error(out, dense(x, ids, weights[:, :1], gate_up, down)) < 1e-5


def test_gradients_equal_those_of_the_dense_reference(arrays):
    x, ids, weights, gate_up, down = arrays

    def every(x, weights, gate_up, down):
        gate, up = jnp.split(jnp.einsum("nd,edf->enf", x, gate_up), 2, axis=-1)
        each = jnp.einsum("enf,efd->end", jax.nn.silu(gate) * up, down)
        return sum(weights[:, j, None] * each[ids[:, j], jnp.arange(N)] for j in range(K))

    def loss(f):
        return jax.jit(jax.grad(lambda *a: (f(*a) ** 2).sum(), argnums=(0, 1, 2, 3)))(
            x, weights, gate_up, down
        )

    ours = loss(lambda x, w, a, b: mixture(x, jnp.asarray(ids), w, a, b, activation="silu"))
    for a, b in zip(ours, loss(every), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("moe")


def loaded(name, root, **options):
    folder, tokens, logits = family_checkpoint(name, root)
    return *peft_jax.load(folder, **options), tokens, logits


@pytest.mark.parametrize(
    "axes", [{"expert": 4, "tensor": 2}, {"expert": 2, "data": 2, "fsdp": 2}], ids=str
)
@pytest.mark.parametrize("name", MOES)
def test_expert_parallelism_on_eight_devices_equals_one(name, axes, root):
    model, params, tokens, logits = loaded(name, root)
    rows = np.tile(tokens, (4, 1))
    adapted = perturb(peft_jax.lora(params, jax.random.key(0), rank=2, targets="all-linear"))
    for tree in (params, adapted):
        expected = jax.jit(peft_jax.bind(model))(tree, rows)
        mesh = make_mesh(axes)
        placed = shard(tree, mesh)
        with jax.set_mesh(mesh):
            spread = jax.device_put(
                rows, jax.NamedSharding(mesh, jax.P(("expert", "data", "fsdp")))
            )
            out = np.asarray(jax.jit(peft_jax.bind(model))(placed, spread))
            single = np.asarray(
                jax.jit(peft_jax.bind(model))(placed, rows[:1])
            )  # too few rows to split
        assert relative_error(out, expected) < 1e-5
        assert relative_error(single, expected[:1]) < 1e-5
    held = placed["model"]["layers"]["mlp"]["experts"]["down_proj"]
    assert held.a.sharding.spec[1] == held.base.sharding.spec[1] == "expert"
    assert relative_error(jax.jit(peft_jax.bind(model))(params, tokens), logits) < 1e-4


def test_gradients_under_expert_parallelism_equal_those_of_one_device(root):
    model, params, tokens, _ = loaded("mixtral_sliding", root)
    rows, apply = np.tile(tokens, (4, 1)), peft_jax.bind(model)
    trainable, frozen = peft_jax.partition(
        perturb(peft_jax.lora(params, jax.random.key(0), rank=2, targets="experts"))
    )

    def gradient(t, f, x):
        return jax.grad(lambda t: (apply(peft_jax.combine(t, f), x) ** 2).mean())(t)

    expected = jax.jit(gradient)(trainable, frozen, rows)
    mesh = make_mesh({"expert": 4, "data": 2})
    placed = shard(peft_jax.combine(trainable, frozen), mesh)
    with jax.set_mesh(mesh):
        out = jax.jit(gradient)(*peft_jax.partition(placed), rows)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


ROUTED = [
    ({"expert": 4, "fsdp": 2}, 8, "tokens"),
    ({"expert": 4, "fsdp": 2}, 8, "pairs"),
    ({"expert": 4, "fsdp": 2}, 8, "experts"),
    ({"expert": 4, "sequence": 2}, 2, "replicas"),
    ({"fsdp": 8}, 8, "experts"),
    ({"fsdp": 8}, 1, "few"),
    ({"expert": 2, "fsdp": 4}, 2, "few"),
    ({"expert": 2, "tensor": 2, "fsdp": 2}, 4, "tokens"),
    ({"expert": 2, "tensor": 2, "fsdp": 2}, 4, "pairs"),
    ({"expert": 2, "tensor": 2, "fsdp": 2}, 1, "replicas"),
]


@pytest.fixture(scope="module")
def routed():
    """A batch [8, 6, D] with padding at its ends, and experts of LoRA over 8 bits."""
    rng = np.random.default_rng(1)
    experts = {
        "gate_up_proj": rng.standard_normal((8, D, 2 * F)).astype(np.float32),
        "down_proj": rng.standard_normal((8, F, D)).astype(np.float32),
    }
    tree = {"mlp": {"experts": jax.tree.map(jnp.asarray, experts)}}
    tree = peft_jax.quantize(tree, Int(bits=8, block_size=4), targets="all-linear")
    tree = perturb(peft_jax.lora(tree, jax.random.key(0), rank=2, targets="all-linear"))
    x = rng.standard_normal((8, 6, D)).astype(np.float32)
    ids = np.stack([rng.permutation(8)[:3] for _ in range(48)]).reshape(8, 6, 3).astype(np.int32)
    ids[:, 4:] = 8  # of no expert
    ids[2:4, :4, 0] = np.where((ids[2:4, :4, 1:] == 5).any(-1), ids[2:4, :4, 0], 5)
    return tree, x, ids, np.abs(rng.standard_normal((8, 6, 3))).astype(np.float32)


@functools.partial(jax.jit, static_argnames="run")
def routed_gradients(tree, x, ids, weights, run):
    """A mixture's output, and the gradients of its adapter, its tokens and its router's weights."""
    trainable, frozen = peft_jax.partition(tree)

    def loss(trainable, x, weights):
        experts = peft_jax.combine(trainable, frozen)["mlp"]["experts"]
        y = run(x, ids, weights, *(experts[f"{n}_proj"] for n in ("gate_up", "down")))
        return (y**2).mean(), y

    gradients, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(trainable, x, weights)
    return [y, *jax.tree.leaves(gradients)]


def on_one_device(x, ids, weights, gate_up, down):
    flat = (a.reshape(-1, a.shape[-1]) for a in (x, ids, weights))
    return mixture(*flat, gate_up, down, activation="silu").reshape(x.shape)


@pytest.mark.parametrize(("axes", "rows", "route"), ROUTED, ids=str)
def test_each_way_of_routing_equals_one_device_with_gradients(
    axes, rows, route, routed, monkeypatch
):
    tree, *batch = routed
    batch = [a[:rows] for a in batch]
    expected = routed_gradients(tree, *batch, on_one_device)
    if route in routing.ROUTES and route != "replicas":
        monkeypatch.setattr(routing, "cheapest", lambda *_: route)
    run = functools.partial(routing.parallel_mixture, activation="silu")
    mesh = make_mesh(axes)
    with jax.set_mesh(mesh):
        found = routed_gradients(shard(tree, mesh), *batch, run)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-5


def test_the_route_that_moves_least_is_taken():
    """Bytes that one of 4 devices receives, counted by hand, for tokens of 10 bytes."""
    assert routing.cheapest(4, tokens=100, chosen=8, row=10, experts=10**6) == "tokens"
    assert routing.cheapest(4, tokens=100, chosen=2, row=10, experts=10**6) == "pairs"
    assert routing.cheapest(4, tokens=100, chosen=8, row=10, experts=7_900) == "experts"
    assert routing.cheapest(4, tokens=100, chosen=8, row=10, experts=8_100) == "tokens"


def test_experts_stay_where_tokens_are_few():
    """Of Qwen3-30B-A3B on 4 devices of fsdp: 16 tokens at a time, and a long batch."""
    sizes = {"chosen": 8, "item": 2, "hidden": 2048, "features": 768, "experts": 302e6}
    assert routing.few(16, **sizes)
    assert not routing.few(16 * 4096, **sizes)


def test_a_mixture_gathers_no_tokens_of_other_rows(routed):
    """Over fsdp each device keeps its tokens: what is gathered are experts, codes as codes."""
    tree, *batch = routed
    mesh = make_mesh({"fsdp": 8})
    run = functools.partial(routing.parallel_mixture, activation="silu")
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, jax.NamedSharding(mesh, P("fsdp"))) for a in batch]
        text = routed_gradients.lower(shard(tree, mesh), *placed, run).compile().as_text()
    gathered = set(re.findall(r"= (\S+?)(?:\{\S*)? all-gather\(", text))
    assert f"s8[8,{F},{D}]" in gathered
    assert f"f32[8,{F},{D}]" not in gathered
    assert not any(re.search(r"\[(48|8,6|144)\b", shape) for shape in gathered)


def test_the_kernel_of_gradients_equals_the_dense_product():
    """Megablox's, in its interpreter; rows beyond the groups and an empty group count nothing."""
    rng = np.random.default_rng(0)
    x, grad = (jnp.asarray(rng.standard_normal((700, n)), jnp.float32) for n in (96, 24))
    sizes = np.asarray([100, 0, 300, 7], np.int32)
    parts = np.split(np.arange(700), np.cumsum(sizes))[:4]
    expected = np.stack([np.asarray(x)[p].T @ np.asarray(grad)[p] for p in parts])
    assert relative_error(tiled_outer(x, grad, sizes, interpret=True), expected) < 1e-5
    w = jnp.zeros((4, 96, 24))
    _, pull = jax.vjp(lambda w: grouped_matmul(x, w, sizes), w)
    assert relative_error(pull(grad)[0], expected) < 1e-5


def test_frozen_experts_keep_no_rows_for_a_gradient_of_theirs():
    x, sizes = jnp.zeros((40, 8)), jnp.asarray([20, 20], jnp.int32)

    def kept(argument):
        run = functools.partial(jax.vjp, argument)
        return {a.shape for a in jax.tree.leaves(jax.eval_shape(lambda a: run(a)[1], x))}

    w = jnp.zeros((2, 8, 6))
    assert (40, 8) not in kept(lambda x: grouped_matmul(x, w, sizes))


@pytest.mark.parametrize("padded", [False, True])
def test_the_routers_loss_matches_pytorch(padded, root):
    model, params, tokens, _ = loaded("mixtral_sliding", root)
    segments = np.ones_like(tokens)
    segments[1, 15:] = 0 if padded else 1
    apply = peft_jax.bind(model)
    _, state = apply(
        params,
        tokens,
        segment_ids=segments if padded else None,
        method="hidden",
        mutable=["router"],
    )
    import transformers

    theirs = transformers.MixtralForCausalLM.from_pretrained(root / "mixtral_sliding")
    with torch.no_grad():
        mask = torch.tensor(segments) if padded else None
        out = theirs(torch.tensor(tokens), attention_mask=mask, output_router_logits=True)
    expected = load_balancing_loss_func(out.router_logits, 4, 2, mask)
    assert abs(float(load_balancing_loss(state["router"])) - float(expected)) < 1e-4 * float(
        expected
    )


def test_training_adds_the_routers_loss_where_it_is_asked_for(root):
    model, params, tokens, _ = loaded("mixtral_sliding", root)
    batch = {"tokens": tokens, "targets": tokens, "weights": np.ones(tokens.shape, np.float32)}
    apply, rng = peft_jax.bind(model), jax.random.key(0)
    plain, _ = next_token(apply, params, batch, rng)
    more, metrics = next_token(apply, params, batch, rng, router_loss=0.5)
    assert abs(float(more - plain - 0.5 * metrics["router"])) < 1e-5
    assert float(next_token(apply, params, batch, None, router_loss=0.5)[0]) == pytest.approx(
        float(plain), abs=1e-5
    )
    gradient = jax.grad(lambda p: next_token(apply, p, batch, rng, router_loss=10.0)[0])(params)
    without = jax.grad(lambda p: next_token(apply, p, batch, rng)[0])(params)

    def gate(tree):
        return tree["model"]["layers"]["mlp"]["gate"]["weight"]

    assert relative_error(gate(gradient), gate(without)) > 1e-2


def test_lora_of_experts_forms_no_dense_update(arrays):
    x, _, _, gate_up, _ = arrays
    params = {"experts": {"gate_up_proj": jnp.asarray(gate_up)}}
    params = perturb(peft_jax.lora(params, jax.random.key(0), rank=2, targets="all-linear"))
    w, sizes = params["experts"]["gate_up_proj"], np.asarray([5, 0, 9, 10], np.int32)
    expected = ragged_matmul(x, w.materialize(), sizes)
    assert relative_error(ragged_matmul(x, w, sizes), expected) < 1e-5
    dense = f"f32[{E},{D},{2 * F}]"  # an update's shape

    def products(run):
        return [
            q for q in str(jax.make_jaxpr(run)(x, w, sizes)).splitlines() if " dot_general" in q
        ]

    assert any(
        dense in q.split("=")[0]
        for q in products(lambda x, w, sizes: ragged_matmul(x, w.materialize(), sizes))
    )
    assert not any(dense in q.split("=")[0] for q in products(ragged_matmul))


@pytest.mark.parametrize("name", MOES)
def test_experts_are_quantized_pruned_and_calibrated(name, root):
    model, params, tokens, _ = loaded(name, root)
    apply = jax.jit(peft_jax.bind(model, strict=True))
    exact = apply(params, tokens)
    quantized = peft_jax.quantize(params, Int(bits=8, block_size=8), targets="all-linear")

    def experts(tree):
        return tree["model"]["layers"]["mlp"]["experts"]

    assert isinstance(experts(quantized)["gate_up_proj"], Quantized)
    assert relative_error(apply(quantized, tokens), exact) < 0.2
    assert relative_error(apply(quantized, tokens), apply(dequantize(quantized), tokens)) < 1e-5
    pruned = peft_jax.prune(params, 0.5, targets="experts")
    assert relative_error(apply(pruned, tokens), apply(peft_jax.merge(pruned), tokens)) < 1e-5
    qlora = perturb(peft_jax.lora(quantized, jax.random.key(0), rank=2, targets="experts"))
    assert relative_error(apply(qlora, tokens), apply(peft_jax.merge(qlora), tokens)) < 2e-5


def test_statistics_of_experts_are_those_of_the_tokens_they_get(root):
    model, params, tokens, _ = loaded("mixtral_sliding", root, scan_layers=False)
    batches = [{"tokens": tokens}]
    place = "model/layers_0/mlp/experts/gate_up_proj"
    apply = peft_jax.bind(model)
    whole = {
        s: calibrate(apply, params, batches, statistic=s, targets=place)
        for s in ("covariance", "second_moment")
    }
    found = {s: of[place] for s, of in whole.items()}
    seen = {}

    def spy(call, args, kwargs, context):
        if type(context.module).__name__ == "Experts" and context.method_name == "__call__":
            seen.setdefault("/".join(context.module.path), tuple(np.asarray(a) for a in args))
        return call(*args, **kwargs)

    with nn.intercept_methods(spy):
        model.apply({"params": params}, tokens)
    x, ids, _ = seen["model/layers_0/mlp/experts"]
    rows, ids = x.reshape(-1, x.shape[-1]), ids.reshape(-1, ids.shape[-1])
    expected = (
        np.stack([rows[(ids == e).any(-1)].T @ rows[(ids == e).any(-1)] for e in range(4)])
        / tokens.size
    )
    np.testing.assert_array_equal(
        whole["covariance"].tokens[place], [(ids == e).any(-1).sum() for e in range(4)]
    )
    assert relative_error(found["covariance"], expected) < 1e-5
    assert relative_error(found["second_moment"], np.einsum("eii->ei", expected)) < 1e-5
    known = {"second_moment": {place: found["second_moment"]}}
    pruned = peft_jax.prune(params, 0.5, score="wanda", targets=place, statistics=known)
    zeros = places(pruned)[place].materialize() == 0
    assert float(zeros.mean()) == pytest.approx(0.5)
    row = Report(
        PruneConfig(targets=place, sensitivity=[]), model, params, pruned, batches, 0, next_token
    ).to_dict()["weights"]
    assert row[place]["tokens"] == [int((ids == e).any(-1).sum()) for e in range(4)]
    assert row[place]["experts"]["sparsity"] == pytest.approx([0.5] * 4)


@pytest.mark.parametrize("name", MOES)
def test_experts_are_taken_away_and_the_rest_load_in_pytorch(name, root, tmp_path):
    import transformers

    from tests.reference import torch_logits

    model, params, tokens, _ = loaded(name, root)
    scores = expert_importance(model, params, [{"tokens": tokens}])
    np.testing.assert_allclose(np.asarray(scores).sum(-1), 1.0, rtol=1e-5)
    chosen = expert_importance(model, params, [{"tokens": tokens}], score="frequency")
    np.testing.assert_allclose(np.asarray(chosen).sum(-1), 2.0, rtol=1e-5)
    smaller, fewer = prune_experts(model, params, [{"tokens": tokens}], 3)
    assert smaller.config.num_experts == 3
    best = np.sort(np.argsort(-np.asarray(scores), axis=-1)[:, :3], axis=-1)

    def experts(tree):
        return tree["model"]["layers"]["mlp"]["experts"]["down_proj"]

    np.testing.assert_array_equal(experts(fewer)[1], experts(params)[1][best[1]])
    peft_jax.save(tmp_path, smaller, fewer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    assert (
        relative_error(jax.jit(peft_jax.bind(smaller))(fewer, tokens), torch_logits(theirs, tokens))
        < 1e-4
    )
    one, single = prune_experts(model, params, [{"tokens": tokens}], 1)
    assert one.config.experts_per_token == 1
    assert np.isfinite(np.asarray(peft_jax.bind(one)(single, tokens))).all()
    cut, short = shrink(model, params, layers=[0, 2])
    assert jax.jit(peft_jax.bind(cut))(short, tokens).shape == (
        *tokens.shape,
        cut.config.vocab_size,
    )


def test_what_experts_cannot_be_pruned_is_refused(root):
    dense, weights, tokens, _ = loaded("llama2", root)
    with pytest.raises(ValueError, match="this llama model has no experts in every layer"):
        prune_experts(dense, weights, [{"tokens": tokens}], 2)
    model, params, tokens, _ = loaded("mixtral_sliding", root)
    with pytest.raises(ValueError, match="experts must leave between 1 and 4, got 5"):
        prune_experts(model, params, [{"tokens": tokens}], 5)
    with pytest.raises(ValueError, match="unknown score of experts 'luck'"):
        expert_importance(model, params, [], score="luck")
    with pytest.raises(ValueError, match="there is no batch"):
        prune_experts(model, params, [], 2)
    with pytest.raises(ValueError, match="units and channels of a mixture of experts are not cut"):
        shrink(model, params, channels=range(16))
    with pytest.raises(ValueError, match="prune_experts makes a mixture smaller"):
        prune_structured(model, params, [{"tokens": tokens}], units=8)


def test_layers_with_and_without_experts_are_not_stacked():
    config = Qwen3MoeConfig(num_hidden_layers=3, num_experts=8, vocab_size=64, mlp_only_layers=[1])
    with pytest.raises(ValueError, match=r"some layers have experts .* scan_layers=False"):
        abstract_params(Decoder(decoder_config(config)))
    assert abstract_params(Decoder(decoder_config(config), scan_layers=False))
