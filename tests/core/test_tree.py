"""Paths, selection, partition, freezing and counting."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax
from peft_jax.adapters import compacter, prefix_tuning
from peft_jax.core import adapter_names, count, drop_adapters, freeze, full, places, select, unmerge
from peft_jax.core.partition import trainable_mask
from peft_jax.core.select import matches
from tests.reference import family_checkpoint

TREE = {
    "model": {
        "embed_tokens": {"embedding": jnp.ones((7, 4))},
        "layers": {
            "self_attn": {
                "q_proj": {"kernel": jnp.ones((2, 4, 4)), "bias": jnp.ones((2, 4))},
                "o_proj": {"kernel": jnp.ones((2, 4, 4))},
            },
            "mlp": {"up_proj": {"kernel": jnp.ones((2, 4, 6))}},
            "norm": {"scale": jnp.ones((2, 4))},
        },
    },
    "lm_head": {"kernel": jnp.ones((4, 7))},
}
Q = "model/layers/self_attn/q_proj/kernel"
O = "model/layers/self_attn/o_proj/kernel"  # noqa: E741
UP = "model/layers/mlp/up_proj/kernel"


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        ("all-linear", (), {Q, O, UP}),
        ("all-linear", "up_proj", {Q, O}),
        (["q_proj", "up_proj"], (), {Q, UP}),
        ("self_attn.q_proj", (), {Q}),
        ("*/self_attn/*", (), {Q, O}),
        (r"re:.*/(q|up)_proj", (), {Q, UP}),
        (r"re:.*_proj/kernel", (), {Q, O, UP}),
        ("lm_head", (), {"lm_head/kernel"}),
        (["all-linear", "embed_tokens"], (), {Q, O, UP, "model/embed_tokens/embedding"}),
    ],
)
def test_selection(targets, exclude, expected):
    assert set(select(TREE, targets, exclude)) == expected


def test_selection_that_finds_nothing_names_the_nearest():
    with pytest.raises(
        ValueError,
        match=r"target 'q_porj' matches nothing. Did you mean 'q_proj'\? Modules here: .*up_proj",
    ):
        select(TREE, ["q_porj"])
    with pytest.raises(ValueError, match=r"exclude 'nothing' matches nothing"):
        select(TREE, "all-linear", "nothing")
    with pytest.raises(ValueError, match=r"leave no place"):
        select(TREE, "q_proj", "q_proj")
    assert not matches(Q, "proj")


def test_partition_has_holes_and_combine_fills_them():
    params = peft_jax.lora(
        TREE,
        jax.random.key(0),
        rank=2,
        targets="q_proj",
        bias="lora_only",
        modules_to_save=["norm"],
    )
    trainable, frozen = peft_jax.partition(params)
    chex.assert_trees_all_equal(peft_jax.combine(trainable, frozen), params)
    sizes = sorted(x.size for x in jax.tree.leaves(trainable))
    assert sizes == [8, 8, 16, 16]  # norm, bias, a and b over two layers
    assert len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen)) == len(
        jax.tree.leaves(params)
    )
    assert count(params) == (48, sum(x.size for x in jax.tree.leaves(TREE)))


def test_nested_nodes_train_unless_frozen():
    once = peft_jax.lora(TREE, jax.random.key(0), rank=2, targets="q_proj", adapter="first")
    twice = peft_jax.lora(
        freeze(once), jax.random.key(1), rank=3, targets="q_proj", adapter="second"
    )
    node = trainable_mask(twice)["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert (node.a, node.base.a, node.base.base) == (True, False, False)
    node = trainable_mask(peft_jax.lora(once, jax.random.key(1), rank=3, targets="q_proj"))[
        "model"
    ]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert (node.a, node.base.a, node.base.base) == (True, True, False)


def test_full_trains_arrays_and_merges_to_them():
    params = full(TREE, targets=["*"], exclude="embed_tokens")
    trained, total = count(params)
    assert total - trained == 28
    chex.assert_trees_all_equal(peft_jax.merge(params), TREE)


def test_unmerge_restores():
    params = peft_jax.lora(TREE, jax.random.key(0), rank=2)
    params = jax.tree.map(lambda x: x + 0.25, params)
    merged = peft_jax.merge(params)
    chex.assert_trees_all_close(unmerge(merged, params), params, rtol=1e-6)


def test_ranks_and_alphas_by_pattern():
    params = peft_jax.lora(
        TREE,
        jax.random.key(0),
        rank=2,
        alpha=8,
        rank_pattern={"up_proj": 4},
        alpha_pattern={"self_attn.q_proj": 1},
        rslora=True,
    )
    nodes = places(params)
    assert {
        p: (n.rank, round(float(n.scale[0]), 4)) for p, n in nodes.items() if p in (Q, O, UP)
    } == {
        Q: (2, 0.7071),
        O: (2, 5.6569),
        UP: (4, 4.0),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"rank_pattern": {"k_proj": 3}}, "rank_pattern 'k_proj' matches nothing"),
        ({"init": "ones"}, "init must be"),
        ({"bias": "some"}, "bias must be"),
        (
            {"targets": "q_proj", "modules_to_save": ["q_proj"]},
            "both a target and in modules_to_save",
        ),
        ({"modules_to_save": ["nomr"]}, "Did you mean 'norm'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        peft_jax.lora(TREE, jax.random.key(0), **options)


def test_boxed_parameters_name_the_remedy():
    import flax.linen as nn

    with pytest.raises(ValueError, match=r"w is boxed .*call flax.linen.meta.unbox first"):
        places({"w": nn.Partitioned(jnp.ones(3), names=("x",))})


def test_initialisation_is_pefts():
    node = places(
        peft_jax.lora({"kernel": jnp.ones((400, 30))}, jax.random.key(0), rank=50, targets="kernel")
    )["kernel"]
    a = np.asarray(node.a)
    assert np.abs(a).max() <= 1 / 20
    assert abs(a.std() - 1 / 20 / np.sqrt(3)) < 1e-3
    assert not np.asarray(node.b).any()


def test_adapters_are_listed_and_dropped_by_name(tmp_path):
    """Weights, attachments and what they share go; what was under and beside them stays as it
    was.
    """
    folder, _, _ = family_checkpoint("llama2", tmp_path)
    _, params = peft_jax.load(folder)
    tree = peft_jax.lora(params, jax.random.key(0), rank=2, adapter="a")
    tree = compacter(
        tree, jax.random.key(0), size=4, dimension=2, placement="pfeiffer", adapter="b"
    )
    tree = prefix_tuning(
        tree, jax.random.key(0), num_virtual_tokens=2, projection=True, adapter="c"
    )
    assert set(adapter_names(tree)) == {"a", "b", "c"}
    left = drop_adapters(tree, ["b", "c"])
    assert adapter_names(left) == ["a"]
    assert jax.tree.structure(drop_adapters(left, ["a"])) == jax.tree.structure(params)
    with pytest.raises(ValueError, match="there is no adapter 'd'"):
        drop_adapters(tree, ["d"])


def test_freezing_what_is_not_there_is_refused():
    params = peft_jax.lora(
        {"a": {"q_proj": {"kernel": jnp.ones((4, 4))}}}, jax.random.key(0), rank=2, targets="q_proj"
    )
    with pytest.raises(ValueError, match="freeze 'k_proj' matches nothing"):
        freeze(params, "k_proj")
    assert not jax.tree.leaves(peft_jax.partition(freeze(params, "q_proj"))[0])


def test_a_target_that_is_the_embedding_says_so():
    params = {
        "model": {
            "embed_tokens": {"embedding": jnp.zeros((8, 4))},
            "q_proj": {"kernel": jnp.zeros((4, 4))},
        }
    }
    with pytest.raises(
        ValueError,
        match=r"The head is the embedding; peft_jax\.models\.untie\(params\) "
        "gives it one of its own",
    ):
        select(params, "lm_head")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_and_whole_modules_are_their_adapters(bias):
    """Two adapters with biases and modules of their own: each is saved in no other, and dropping
    gives the base back.
    """

    def make(tree, name):
        return peft_jax.lora(
            tree,
            jax.random.key(0),
            rank=2,
            targets="q_proj",
            bias=bias,
            modules_to_save=["norm"],
            adapter=name,
        )

    both = jax.tree.map(lambda x: x, make(freeze(make(TREE, "a")), "b"))
    assert adapter_names(both) == ["b", "a"]
    chex.assert_trees_all_equal(drop_adapters(both, ["b", "a"]), TREE)
    with pytest.raises(ValueError, match="has LoRA 'b' already; give this one another name"):
        make(both, "b")


def test_one_layer_of_a_stack_trains_whole():
    params = peft_jax.lora(
        TREE, jax.random.key(0), rank=2, targets="q_proj", modules_to_save=["layers.1.mlp.up_proj"]
    )
    changed = jax.tree.map(lambda x: x + 1, peft_jax.partition(params)[0])
    merged = places(peft_jax.merge(peft_jax.combine(changed, peft_jax.partition(params)[1])))[UP]
    np.testing.assert_array_equal(np.asarray(merged - places(TREE)[UP])[:, 0, 0], [0, 1])
