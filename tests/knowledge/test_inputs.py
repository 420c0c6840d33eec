"""Triples and entities in the input: mentions, soft positions, the visible matrix through
gradients, vectors at mentions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models

import peft_jax
from peft_jax.adapters import prefix_tuning, prompt_tuning
from peft_jax.core import places
from peft_jax.core.attachment import attach
from peft_jax.core.mesh import make_mesh
from peft_jax.core.sharding import shard
from peft_jax.data import Record, Rows
from peft_jax.data.labelled import LabelledRows
from peft_jax.knowledge.constraints import constrained
from peft_jax.knowledge.hooks import KEY, Noise
from peft_jax.knowledge.inputs import (
    EntityFusion,
    attach_triples,
    entity_fusion,
    find_mentions,
    make_lexicon,
    make_triples,
    mark_entities,
    read_entities,
    reads_knowledge,
)
from peft_jax.objectives.tokens import TOKENS
from peft_jax.training.loop import on_devices
from tests.models.test_encoders import T5_SIZES
from tests.reference import perturb, relative_error, tiny_llama_folder, torch_model

FACTS = [
    Record({"subject": s, "relation": "capital", "object": o}, s)
    for s, o in (("Peru", "Lima"), ("Cuba", "Havana"), ("New York", "Albany"), ("York", "York"))
]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tiny_llama_folder(tmp_path_factory.mktemp("decoder"), num_hidden_layers=1)
    model, params = peft_jax.load(folder)
    return model, params, peft_jax.load_tokenizer(folder), "model/embed_tokens"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, decoder):
    folder, sizes = (
        tmp_path_factory.mktemp("encoder"),
        {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4},
    )
    config = transformers.BertConfig(vocab_size=len(decoder[2]), num_hidden_layers=1, **sizes)
    torch_model(config).save_pretrained(folder)
    model, params = peft_jax.load(folder, task="masked_lm")
    return model, params, decoder[2], "bert/embeddings/word_embeddings"


def rows_for(tokenizer, text, length=32):
    ids = tokenizer(text)["input_ids"]
    n, shape = len(ids), (1, length)
    rows = Rows(*(np.zeros(shape, t) for t in (np.int32, np.int32, np.float32, np.int32, np.int32)))
    rows.tokens[0, :n], rows.targets[0, : n - 1], rows.weights[0, : n - 1] = ids, ids[1:], 1
    rows.positions[0, :n], rows.segment_ids[0, :n] = np.arange(n), 1
    return rows


def test_mentions_are_the_longest_whole_words(decoder):
    tokenizer = decoder[2]
    lexicon = make_lexicon(tokenizer, ["Peru", ["New York", "Gotham"], "York"])

    def found(text):
        return [
            (name, tokenizer.decode(ids[a:b]).strip())
            for ids in [tokenizer(text, add_special_tokens=False)["input_ids"]]
            for a, b, name in find_mentions(lexicon, ids)
        ]

    assert found("Peru and New York, not Peruvian Yorkshire") == [(0, "Peru"), (1, "New York")]
    assert found("in Gotham or York.") == [(1, "Gotham"), (2, "York")]


MENTIONS = [  # names, text, mentions
    ("Go", "Google and Gogo; Go, and Go", ["Go", "Go"]),
    ("Peru,Lima", "(Peru) “Lima”… Peru’s, XPeru Peruvian", ["Peru", "Lima", "Peru"]),
    ("Ann,Annecy", "Annecy is not Ann", ["Annecy", "Ann"]),
    ("Per,Łód", "Perú, Łódź", []),
    ("東京", "我在東京都", ["東京"]),
]


@pytest.mark.parametrize("kind", ["embedded", "gpt2", "bert_uncased", "mistral_v1"])
@pytest.mark.parametrize(("names", "text", "wanted"), MENTIONS)
def test_mentions_are_found_by_every_kind_of_tokenizer(names, text, wanted, kind, tokenizer_of):
    """Byte-level, WordPiece and SentencePiece; the words are those of the text, whose tokens the
    tokenizer's offsets tell.
    """
    tokenizer = tokenizer_of(kind)
    encoded = tokenizer(text, return_offsets_mapping=True)
    lexicon = make_lexicon(tokenizer, names.split(","))
    found = []
    for start, end, name in find_mentions(lexicon, encoded["input_ids"]):
        a, b = encoded["offset_mapping"][start][0], encoded["offset_mapping"][end - 1][1]
        assert names.split(",")[name] in text[a:b]
        found.append(names.split(",")[name])
    assert found == wanted


def test_mentions_end_with_their_segment_and_padding_is_on_either_side(decoder):
    tokenizer = decoder[2]
    ids = tokenizer("in New York", add_special_tokens=False)["input_ids"]
    lexicon = make_lexicon(tokenizer, ["New York", "York"])

    def found(ids, segments):
        return [
            (tokenizer.decode(ids[a:b]).strip(), n)
            for a, b, n in find_mentions(lexicon, ids, segments)
        ]

    assert found([0, 0, *ids], [0, 0] + [1] * len(ids)) == [("New York", 0)]
    new = len(tokenizer("in New", add_special_tokens=False)["input_ids"])
    assert found(ids, [1] * new + [2] * (len(ids) - new)) == [("York", 1)]


def test_names_that_a_tokenizer_cannot_say_are_told(decoder, caplog):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0, "Peru": 1}, unk_token="[UNK]")),
        unk_token="[UNK]",
    )
    lexicon = make_lexicon(tokenizer, ["Chile", "Peru"])
    assert "1 names hold what the tokenizer cannot say and are never found: 'Chile'" in caplog.text
    assert find_mentions(lexicon, [0, 1, 0]) == [(1, 2, 1)]


def test_triples_stand_at_their_mentions_with_soft_positions(decoder):
    tokenizer = decoder[2]
    rows = rows_for(tokenizer, "From Peru to Cuba by sea")
    made = attach_triples(rows, make_triples(tokenizer, FACTS), room=24)
    assert made.tokens.shape == (1, 56)
    used, sentence = made.segment_ids[0] > 0, made.branches[0] == 0
    trunk = used & sentence
    for name in ("tokens", "positions", "targets", "weights"):  # the sentence is as it was
        np.testing.assert_array_equal(
            getattr(made, name)[0][trunk], getattr(rows, name)[0][rows.segment_ids[0] > 0]
        )
    assert [tokenizer.decode(made.tokens[0][made.branches[0] == n]) for n in (1, 2)] == [
        " capital Lima",
        " capital Havana",
    ]
    assert not made.weights[0][~sentence].any()
    for branch in (1, 2):
        at = np.flatnonzero(made.branches[0] == branch)
        last = at[-1] + 1  # the mention's last token comes after
        assert made.branches[0, last] == 0
        assert made.mentions[0, last] == made.mentions[0, at[0]] == branch
        np.testing.assert_array_equal(
            made.positions[0, at], made.positions[0, last] + 1 + np.arange(len(at))
        )
    none = attach_triples(rows, make_triples(tokenizer, FACTS), room=0)
    assert none.tokens.shape == rows.tokens.shape
    assert not none.branches.any()


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_token_does_not_see_anothers_triple(kind, request):
    """Gradients of the first layer's output: zero exactly where the visible matrix says so."""
    model, params, tokenizer, embedding = request.getfixturevalue(kind)
    rows = attach_triples(
        rows_for(tokenizer, "From Peru to Cuba by sea"), make_triples(tokenizer, FACTS), room=24
    )
    n = int((rows.segment_ids > 0).sum())
    inputs = {
        k: jnp.asarray(getattr(rows, k))
        for k in ("positions", "segment_ids", "branches", "mentions")
    }
    apply = reads_knowledge(peft_jax.bind(model))
    D = places(params)[f"{embedding}/embedding"].shape[-1]

    @jax.jit
    def seen(params):
        def noisy(noise):
            return apply(
                attach(params, {embedding: {KEY: Noise(noise=noise)}}),
                jnp.asarray(rows.tokens),
                method="hidden",
                **inputs,
            )[0]

        weigh = jax.random.normal(jax.random.key(0), (D,))
        return jax.jacrev(lambda noise: noisy(noise) @ weigh)(
            jnp.zeros((1, rows.tokens.shape[1], D))
        )

    gradient = np.abs(np.asarray(seen(params))[:n, 0, :n]).sum(-1) > 0
    b, m = rows.branches[0, :n], rows.mentions[0, :n]
    wanted = np.zeros((n, n), bool)
    for i in range(n):
        for j in range(n):
            together = b[i] == b[j]
            attached = 0 in (b[i], b[j]) and m[i] == m[j] != 0
            wanted[i, j] = (together or attached) and (kind == "encoder" or j <= i)
    np.testing.assert_array_equal(gradient, wanted)
    peru, cuba = (np.flatnonzero((b == 0) & (m == k)) for k in (1, 2))
    assert gradient[peru[-1]][b == 1].all()
    assert not gradient[peru][:, b == 2].any()
    assert not gradient[b == 1][:, cuba].any()


@pytest.mark.parametrize("prefixed", [False, True])
def test_generation_sees_what_the_whole_row_sees(decoder, prefixed):
    """Greedy tokens with a key/value cache, of prompts of unlike length, are those of running the
    whole rows each time.
    """
    model, params, tokenizer, _ = decoder
    params = (
        perturb(prefix_tuning(params, jax.random.key(0), num_virtual_tokens=3))
        if prefixed
        else params
    )
    beside = functools.partial(attach_triples, triples=make_triples(tokenizer, FACTS), room=24)
    prompts, count = ["From Peru to Cuba", "So by sea and by air at last to New York from"], 6
    found = peft_jax.generate(
        reads_knowledge(model),
        params,
        [tokenizer(p)["input_ids"] for p in prompts],
        max_tokens=count,
        eos_token_id=-2,
        beside=beside,
    )
    plain = peft_jax.generate(
        model,
        params,
        [tokenizer(p)["input_ids"] for p in prompts],
        max_tokens=count,
        eos_token_id=-2,
    )
    assert found != plain
    apply = jax.jit(reads_knowledge(peft_jax.bind(model)))
    for prompt, tokens in zip(prompts, found, strict=True):
        row = beside(rows_for(tokenizer, prompt, 40))._asdict()
        fields = {
            k: row[k].copy() for k in ("tokens", "positions", "segment_ids", "branches", "mentions")
        }
        n = int((row["segment_ids"] > 0).sum())
        for token in tokens:
            logits = np.asarray(
                apply(
                    params, fields["tokens"], **{k: x for k, x in fields.items() if k != "tokens"}
                )
            )
            assert logits[0, n - 1].argmax() == token
            new = {
                "tokens": token,
                "positions": fields["positions"][0, n - 1] + 1,
                "segment_ids": 1,
            }
            for name, x in fields.items():
                x[0, n] = new.get(name, 0)
            n += 1


def test_virtual_tokens_and_encoder_decoders_take_no_triples(decoder, tmp_path):
    model, params, tokenizer, _ = decoder
    beside = functools.partial(attach_triples, triples=make_triples(tokenizer, FACTS), room=24)
    tuned = prompt_tuning(params, jax.random.key(0), num_virtual_tokens=3)
    with pytest.raises(ValueError, match="leave virtual tokens out"):
        peft_jax.generate(
            reads_knowledge(model),
            tuned,
            ["From Peru"],
            tokenizer=tokenizer,
            max_tokens=2,
            beside=beside,
        )
    with pytest.raises(ValueError, match="branches, mentions, which the model's call"):
        peft_jax.generate(model, params, ["From Peru"], tokenizer=tokenizer, beside=beside)
    config = transformers.T5Config(**{**T5_SIZES, "vocab_size": len(tokenizer)})
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    model, params = peft_jax.load(tmp_path)
    with pytest.raises(ValueError, match="read by decoders with a cache alone"):
        peft_jax.generate(
            reads_knowledge(model),
            params,
            ["From Peru"],
            tokenizer=tokenizer,
            max_tokens=2,
            beside=beside,
        )


def test_packed_sequences_stay_apart(decoder):
    model, params, tokenizer, _ = decoder
    apply = jax.jit(reads_knowledge(peft_jax.bind(model)))
    triples = make_triples(tokenizer, FACTS)
    alone = [
        attach_triples(rows_for(tokenizer, t, 24), triples, room=24)
        for t in ("From Peru by sea", "To Cuba by air")
    ]

    def inputs(r):
        return {k: getattr(r, k) for k in ("positions", "segment_ids", "branches", "mentions")}

    apart = [
        np.asarray(apply(params, r.tokens, **inputs(r)))[0][r.segment_ids[0] > 0] for r in alone
    ]
    both = rows_for(tokenizer, "From Peru by sea", 24)
    n, other = int((both.segment_ids > 0).sum()), rows_for(tokenizer, "To Cuba by air", 24)
    k = int((other.segment_ids > 0).sum())
    for name in Rows._fields:
        getattr(both, name)[0, n : n + k] = getattr(other, name)[0, :k] + (name == "segment_ids")
    packed = attach_triples(both, triples, room=24)
    logits = np.asarray(apply(params, packed.tokens, **inputs(packed)))[0]
    for segment, wanted in enumerate(apart, 1):
        np.testing.assert_allclose(logits[packed.segment_ids[0] == segment], wanted, atol=1e-5)


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_eight_devices_equal_one(decoder, axes):
    """Loss and gradients of a LoRA and of the entities' projection, with triples and rules."""
    model, params, tokenizer, _ = decoder
    texts = ["From Peru to Cuba by sea", "To Cuba by air", "New York is old", "In Peru"] * 2
    rows = Rows(
        *(np.concatenate(x) for x in zip(*(rows_for(tokenizer, t) for t in texts), strict=True))
    )
    rows = mark_entities(rows, make_lexicon(tokenizer, ["Peru", "Cuba"]))
    batch = attach_triples(rows, make_triples(tokenizer, FACTS), room=24)._asdict()
    batch["rules"] = np.where(batch["weights"] > 0, 1, 0)
    tables = {"allowed": (np.arange(4096)[None] % 2 == 0, 0.5)}
    params = perturb(peft_jax.lora(entity_fusion(params, np.eye(2)), jax.random.key(0), rank=2))
    apply = reads_knowledge(peft_jax.bind(model))

    @jax.jit
    def run(trainable, frozen, batch):
        def of(t):
            return constrained(
                TOKENS, tables, apply, peft_jax.combine(t, frozen), batch, jax.random.key(0)
            )[0]

        return jax.value_and_grad(of)(trainable)

    wanted = run(*peft_jax.partition(params), batch)
    mesh = make_mesh(axes)
    found = run(*peft_jax.partition(shard(params, mesh)), on_devices(batch, mesh))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert relative_error(a, b) < 2e-4


def test_rows_whose_labels_are_places_are_refused(decoder):
    z = np.zeros((2, 8), np.int32)
    with pytest.raises(ValueError, match="rows of one text each"):
        attach_triples(
            LabelledRows(z, z, z, np.zeros((2, 2), np.int32), np.ones(2)),
            make_triples(decoder[2], FACTS),
        )


def test_vectors_are_added_where_entities_are_mentioned(decoder, tmp_path):
    model, params, tokenizer, _ = decoder
    np.savez(tmp_path / "e.npz", names=np.asarray(["Peru", "Cuba"]), vectors=np.eye(2))
    names, vectors = read_entities(tmp_path / "e.npz")
    rows = mark_entities(
        rows_for(tokenizer, "From Peru to Cuba by sea"), make_lexicon(tokenizer, names)
    )
    assert sorted(rows.entities[rows.entities > 0]) == [1, 2]
    informed = entity_fusion(params, vectors)
    apply = jax.jit(reads_knowledge(peft_jax.bind(model)))
    plain = apply(params, rows.tokens, segment_ids=rows.segment_ids)
    start = apply(informed, rows.tokens, segment_ids=rows.segment_ids, entities=rows.entities)
    np.testing.assert_array_equal(plain, start)  # zero at first
    trainable, frozen = peft_jax.partition(informed)
    assert sum(x.size for x in jax.tree.leaves(trainable)) == 2 * model.config.hidden_size
    moved = peft_jax.combine(jax.tree.map(lambda x: x + 1.0, trainable), frozen)
    changed = np.abs(
        np.asarray(apply(moved, rows.tokens, segment_ids=rows.segment_ids, entities=rows.entities))
        - plain
    ).max(-1)
    first = int(np.flatnonzero(rows.entities[0])[0])
    assert not changed[0, :first].any()
    assert changed[0, first] > 0
    peft_jax.save_adapter(tmp_path / "adapter", moved)
    again = peft_jax.load_adapter(params, tmp_path / "adapter")
    np.testing.assert_array_equal(
        apply(again, rows.tokens, segment_ids=rows.segment_ids, entities=rows.entities),
        apply(moved, rows.tokens, segment_ids=rows.segment_ids, entities=rows.entities),
    )


@pytest.mark.parametrize(
    "arrays",
    [
        {"names": ["a"]},
        {"names": ["a"], "vectors": np.eye(2)},
        {"names": ["a"], "vectors": [[np.nan]]},
    ],
)
def test_bad_vectors_are_refused(arrays, tmp_path):
    np.savez(tmp_path / "e.npz", **arrays)
    with pytest.raises(ValueError, match=r"e\.npz"):
        read_entities(tmp_path / "e.npz")


def test_entities_stand_at_their_tokens_behind_a_prompt():
    table, out = np.eye(3, dtype=np.float32), np.zeros((1, 6, 3), np.float32)
    node = EntityFusion(
        table=table, weight=np.eye(3, dtype=np.float32), entities=np.array([[0, 2, 0, 1]])
    )
    fused = node.around(lambda ids: out, np.zeros((1, 6), np.int32))
    np.testing.assert_array_equal(
        fused[0], np.stack([out[0, 0], out[0, 0], out[0, 0], table[1], out[0, 0], table[0]])
    )
