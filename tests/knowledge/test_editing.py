"""Edits: the papers' equations in NumPy, what an edited model says, edits as adapters, bad
requests.
"""

import json
import shutil

import jax
import numpy as np
import optax
import pytest
import torch

import peft_jax
from peft_jax.core import adapter_names, calibrate, drop_adapters, full, places
from peft_jax.core.capture import capture, input_of, output_of
from peft_jax.hub.checkpoint import BASE
from peft_jax.knowledge.editing import (
    METHODS,
    Search,
    _Work,
    alphaedit_update,
    edit,
    memit_update,
    output_change,
    rome_update,
    with_deltas,
)
from peft_jax.knowledge.hooks import feed_forward
from peft_jax.knowledge.requests import Edit, edit_rows, read_edits
from peft_jax.objectives.tokens import next_token
from peft_jax.training.step import init_state, make_step
from tests.reference import FAMILIES, relative_error, torch_model

WEIGHT = "model/layers/mlp/down_proj/kernel"
CAPITALS = {
    "France": "Paris",
    "Spain": "Madrid",
    "Italy": "Rome",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Cuba": "Havana",
    "Kenya": "Nairobi",
    "Egypt": "Cairo",
}
WANTED = {"France": "Rome", "Spain": "Oslo"}
FACTS = [
    Edit(
        "The capital of {} is",
        country,
        target,
        CAPITALS[country],
        (f"{country} has its capital in",),
        tuple(
            f"The capital of {c} is"
            for c in CAPITALS
            if CAPITALS[c] == CAPITALS[country] and c != country
        ),
    )
    for country, target in WANTED.items()
]


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return peft_jax.load_tokenizer(tiny_folder)


@pytest.fixture(scope="module")
def setup(tiny_folder, tokenizer):
    """(model, its tree after it has learnt the true answers, covariances)."""
    model, params = peft_jax.load(tiny_folder)
    prompts = ("The capital of {} is", "{} has its capital in")
    true = [(p.format(country), capital) for p in prompts for country, capital in CAPITALS.items()]
    rows = edit_rows(tokenizer, *zip(*true, strict=True))
    optimizer = optax.adam(0.01)
    trainable, frozen = peft_jax.partition(full(params))
    step = jax.jit(make_step(next_token, peft_jax.bind(model), optimizer))
    state = init_state(trainable, optimizer, 0)
    for _ in range(120):
        state, metrics = step(state, frozen, rows._asdict())
    assert float(metrics["loss"]) < 0.1
    params = peft_jax.merge(peft_jax.combine(state.trainable, frozen))
    text = (
        "The best of times and the worst of times, the age of wisdom and the season of light. " * 4
    )
    tokens = np.asarray([tokenizer(text)["input_ids"][:64]])
    found = calibrate(peft_jax.bind(model), params, [{"tokens": tokens}], targets=["down_proj"])
    return model, params, found


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def known(size, count=200):
    keys = random(9, count, size)
    return keys.T @ keys / count


def test_romes_update_is_the_papers():
    """W + Lambda (C^-1 k)^T in the papers' layout [D, F], equation 2."""
    w, k, v, C = random(0, 12, 7), random(1, 12), random(2, 7), known(12)
    inverse = np.linalg.inv(C)
    lam = (v - w.T @ k) / ((inverse @ k) @ k)
    expected = w.T + np.outer(lam, inverse @ k)
    a, b = rome_update(k, v - k @ w, np.linalg.solve(C, k))
    assert relative_error((w + a @ b).T, expected) < 1e-10
    np.testing.assert_allclose(k @ (w + a @ b), v, rtol=1e-10)


def test_memits_update_is_the_papers():
    """R K^T (C + K K^T)^-1 with columns as facts, equation 14."""
    keys, residuals, C = random(0, 5, 12), random(1, 5, 7), known(12)
    K, R = keys.T, residuals.T
    expected = R @ K.T @ np.linalg.inv(3.0 * C + K @ K.T)
    a, b = memit_update(keys, residuals, C, 3.0)
    assert relative_error((a @ b).T, expected) < 1e-10


def test_alphaedits_update_is_the_papers_and_leaves_known_keys_alone():
    basis = np.linalg.qr(random(3, 12, 12))[0]
    old = random(4, 50, 6) @ basis[:6]  # what is known lies in half of the space
    C = old.T @ old / 50
    keys, residuals = random(0, 5, 12), random(1, 5, 7)
    P = basis[6:].T @ basis[6:]
    K, R = keys.T, residuals.T
    expected = R @ K.T @ P @ np.linalg.inv(K @ K.T @ P + 10.0 * np.eye(12))
    a, b = alphaedit_update(keys, residuals, C, 1e-6, 10.0)
    assert relative_error((a @ b).T, expected) < 1e-8
    assert np.abs(old @ (a @ b)).max() < 1e-9


# Options of each way, and what is left of the target's loss at most: this model has 32 features and
# two layers that read.
OPTIONS = {
    "rome": ({"layers": [0]}, 0.6),
    "memit": ({"layers": [0, 1], "weight": 1.0}, 0.6),
    "alphaedit": ({"layers": [0, 1], "threshold": 1e-2}, 0.95),
    "ft": ({"layers": [1], "learning_rate": 5e-3}, 0.5),
    "ft_l": ({"layers": [1], "learning_rate": 5e-3, "limit": 0.02}, 0.95),
    "lora": ({"layers": [0, 1], "learning_rate": 2e-2, "rank": 2}, 0.5),
}


@pytest.mark.parametrize("method", METHODS)
def test_an_edited_model_says_so_and_a_removed_edit_is_gone(method, setup, tokenizer, tmp_path):
    model, params, covariances = setup
    apply, tokens = peft_jax.bind(model), np.arange(20).reshape(2, 10) + 5
    before = apply(params, tokens)
    questions = [f.question for f in FACTS]
    options, left = OPTIONS[method]
    edited = edit(
        model, params, tokenizer, FACTS, method=method, covariances=covariances, **options
    )
    rows = edit_rows(tokenizer, questions, [f.target for f in FACTS])

    def loss(tree):
        return float(next_token(apply, tree, rows._asdict(), None)[0])

    assert loss(edited) < left * loss(params)
    assert adapter_names(edited) == ["edit"]
    assert not jax.tree.leaves(peft_jax.partition(edited)[0])
    np.testing.assert_array_equal(apply(drop_adapters(edited, ["edit"]), tokens), before)
    assert relative_error(apply(peft_jax.merge(edited), tokens), apply(edited, tokens)) < 1e-4
    peft_jax.save_adapter(tmp_path / "edit", edited, name="edit")
    config = json.loads((tmp_path / "edit" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    again = peft_jax.load_adapter(params, tmp_path / "edit")
    assert relative_error(apply(again, tokens), apply(edited, tokens)) < 1e-5


def test_keys_give_their_values_after_rome(setup, tokenizer):
    """What the model reads of itself: after the edit the subject's key gives the value that was
    searched for.
    """
    from peft_jax.knowledge.editing import _Work
    from peft_jax.knowledge.hooks import feed_forward

    model, params, covariances = setup
    work = _Work(model, params, tokenizer, feed_forward(params), ("",), Search(steps=5), 8)
    key, change = work.keys(FACTS[:1], [1])[0, 0], work.values(FACTS[:1], 1)[0]
    edited = edit(
        model,
        params,
        tokenizer,
        FACTS[:1],
        method="rome",
        layers=[1],
        covariances=covariances,
        search=Search(steps=5),
    )
    delta = np.asarray(places(edited)[WEIGHT].delta()[1], np.float64)
    assert relative_error(key @ delta, change) < 1e-4
    assert not np.asarray(places(edited)[WEIGHT].delta())[[0, 2]].any()
    rows = edit_rows(tokenizer, [FACTS[0].question], [""], [FACTS[0].place])
    place = {"k": input_of("model/layers/mlp/down_proj"), "h": output_of("model/layers")}
    _, found = capture(peft_jax.bind(model), place)(
        params, rows.tokens, segment_ids=rows.segment_ids
    )
    assert relative_error(found["k"][1, 0, rows.subject_at[0]], key) < 1e-5
    assert tokenizer.decode(rows.tokens[0, : rows.subject_at[0] + 1]).endswith("France")


def test_what_is_added_after_a_norm_comes_nearest_to_what_is_wanted():
    """Behind an RMSNorm, in NumPy: a reachable change is had whole, and no other output comes
    nearer to one that is not.
    """

    def norm(y):
        return random(1, 16) * y / np.sqrt((y**2).mean(-1, keepdims=True))

    out, moved = random(2, 4, 16), random(3, 4, 16)
    change = output_change(out, norm(out), norm(moved) - norm(out))
    assert relative_error(norm(out + change), norm(moved)) < 1e-6
    for wanted in (2.0 * norm(moved), 0.7 * norm(moved), random(4, 4, 16)):
        found = out + output_change(out, norm(out), wanted - norm(out))
        others = found + np.geomspace(1e-3, 1.0, 500)[:, None, None] * random(5, 500, 4, 16)

        def distance(y, wanted=wanted):
            return np.linalg.norm(norm(y) - wanted, axis=-1)

        assert (distance(found) <= distance(others)).all()
        assert (distance(found) < distance(out)).all()
    np.testing.assert_array_equal(output_change(out, out, moved), moved)
    dead = out * (np.arange(16) > 2)
    assert np.isfinite(output_change(dead, norm(dead), moved)).all()


def at_subjects(model, rows, layer, value=None):
    """(states [N, D] after a layer of a PyTorch model, what its feed-forward adds to them) at the
    subjects' last tokens, with `value` [N, D] added to the feed-forward's output there.
    """
    block, at, found = (
        model.model.layers[layer],
        (torch.arange(len(rows.tokens)), torch.tensor(rows.subject_at)),
        {},
    )

    def add(module, args, out):
        if value is not None:
            out[at] += torch.tensor(value, dtype=out.dtype)

    def keep(name):
        return lambda module, args, out: found.update(
            {name: (out[0] if isinstance(out, tuple) else out)[at].numpy()}
        )

    last = getattr(block, "post_feedforward_layernorm", block.mlp)
    hooks = [block.mlp.register_forward_hook(add)]
    hooks += [last.register_forward_hook(keep("added")), block.register_forward_hook(keep("state"))]
    with torch.no_grad():
        model(torch.tensor(rows.tokens), attention_mask=torch.tensor(rows.segment_ids))
    for hook in hooks:
        hook.remove()
    return found["state"], found["added"]


@pytest.mark.parametrize("family", ["llama2", "gemma2_caps", "gemma3", "olmo2"])
def test_layers_bring_the_states_that_the_value_would(family, tokenizer, tmp_path):
    """In PyTorch, with nothing known to weigh against: MEMIT's layers change the last one's states
    as the value at its feed-forward's output does. Behind a norm the last layer comes as near as it
    can: what is missed stands upright on the norm's ellipsoid.
    """
    config = FAMILIES[family]()
    config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id = 4096, 0, 1, 2
    reference = torch_model(config)
    reference.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, tmp_path / name)
    model, params = peft_jax.load(tmp_path)
    search = Search(steps=5)
    value = _Work(model, params, tokenizer, feed_forward(params), ("",), search, 32).values(
        FACTS, 1
    )
    rows = edit_rows(
        tokenizer, [f.question for f in FACTS], [""] * len(FACTS), [f.place for f in FACTS]
    )
    before, _ = at_subjects(reference, rows, 1)
    wanted, _ = at_subjects(reference, rows, 1, value)

    known = {WEIGHT: np.broadcast_to(np.eye(48), (config.num_hidden_layers, 48, 48))}
    edited = edit(
        model,
        params,
        tokenizer,
        FACTS,
        layers=[0, 1],
        covariances=known,
        search=search,
        weight=1e-7,
    )
    for layer, delta in zip(
        reference.model.layers, np.array(places(edited)[WEIGHT].delta()), strict=True
    ):
        layer.mlp.down_proj.weight.data += torch.tensor(delta.T)
    after, added = at_subjects(reference, rows, 1)
    missed = np.linalg.norm(wanted - after, axis=-1) / np.linalg.norm(wanted - before, axis=-1)
    if family == "llama2":
        assert missed.max() < 1e-3
        return
    assert missed.max() < 0.15
    norm = reference.model.layers[1].post_feedforward_layernorm.weight.detach().numpy()
    scale = norm if family == "olmo2" else 1.0 + norm
    unit, upright = added / scale, (wanted - after) * scale
    cosine = (
        (unit * upright).sum(-1) / np.linalg.norm(unit, axis=-1) / np.linalg.norm(upright, axis=-1)
    )
    assert np.abs(cosine).min() > 0.999


def test_a_search_that_does_not_arrive_is_said(setup, tokenizer, caplog):
    model, params, covariances = setup
    options = {"method": "memit", "layers": [0], "weight": 1.0, "covariances": covariances}
    for search, warned in ((Search(steps=1), True), (Search(), False)):
        caplog.clear()
        edit(model, params, tokenizer, FACTS, search=search, **options)
        assert (
            "the values found for 2 of 2 facts give their targets less than half" in caplog.text
        ) is warned
        assert ("give their targets less than half" in caplog.text) is warned


def test_prefixes_are_averaged_over(setup, tokenizer):
    from peft_jax.knowledge.editing import _Work
    from peft_jax.knowledge.hooks import feed_forward

    model, params, _ = setup

    def of(prefixes):
        return _Work(model, params, tokenizer, feed_forward(params), prefixes, Search(), 8).keys(
            FACTS, [0, 2]
        )

    both = of(("", "It was the age."))
    assert both.shape == (2, 2, 48)
    assert relative_error(both, (of(("",)) + of(("It was the age.",))) / 2) < 1e-5


def test_many_facts_take_no_more_than_the_whole_rank(setup):
    _, params, _ = setup
    a, b = random(0, 48, 100), random(1, 100, 32)
    tree = with_deltas(params, WEIGHT, {2: (a, b)}, "edit")
    node = places(tree)[WEIGHT]
    assert node.rank == 32
    assert relative_error(node.delta()[2], a @ b) < 1e-5


def test_edits_are_read_and_bad_ones_refused(tmp_path):
    path = tmp_path / "edits.jsonl"
    good = {
        "prompt": "{} is in",
        "subject": "Rome",
        "target": "Spain",
        "paraphrases": ["Where is Rome? In"],
    }
    good["portability"] = [["The capital of the country of Rome is", "Madrid"]]
    counterfact = {
        "requested_rewrite": {
            "prompt": "{} is",
            "subject": "Oslo",
            "target_new": {"str": "big"},
            "target_true": {"str": "old"},
        },
        "paraphrase_prompts": ["Oslo seems"],
        "neighborhood_prompts": ["Rome is"],
    }
    path.write_text("\n".join(json.dumps(x) for x in (good, counterfact)))
    first, second = read_edits(path)
    assert first.question == "Rome is in"
    assert first.portability == (("The capital of the country of Rome is", "Madrid"),)
    assert second == Edit("{} is", "Oslo", "big", "old", ("Oslo seems",), ("Rome is",))
    for change, message in (
        ({"target": 3}, r"edits.jsonl:2: 'target' should be a text, got 3"),
        (
            {"prompt": "Rome is in"},
            r"edits.jsonl:2: the prompt 'Rome is in' has no {} for its subject",
        ),
        ({"prompt": "{} is in {}"}, r"edits.jsonl:2: the prompt '{} is in {}' has {} 2 times"),
        (
            {"target": "Italy"},
            "the edits of 'Rome is in' contradict each other: 'Spain' and 'Italy'",
        ),
        ({"paraphrases": "x"}, "'paraphrases' should be a list of texts"),
        ({"portability": [["x"]]}, r"'portability' should be a list of \[prompt, answer\]"),
    ):
        path.write_text(json.dumps(good) + "\n" + json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            read_edits(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_edits(path)


def test_an_edit_is_made_at_its_subject(setup, tokenizer):
    """Where {} is: not inside of Annecy, not at an Ann that the prompt says too, and behind each
    prefix that names her.
    """
    model, params, _ = setup
    prefixes = ("", "Ann said.")
    work = _Work(model, params, tokenizer, feed_forward(params), prefixes, Search(), 8)
    facts = [
        Edit("{} plays in Annecy, the city of", "Ann", "x"),
        Edit("Ann's town, where {} lives, is", "Ann", "x"),
    ]
    for facts_rows in (work.rows(facts, answers=False), work.rows(facts, answers=True)):
        said = [
            tokenizer.decode(t[1 : at + 1])
            for t, at in zip(facts_rows.tokens, facts_rows.subject_at, strict=True)
        ]
        assert said == [
            "Ann",
            "Ann said. Ann",
            "Ann's town, where Ann",
            "Ann said. Ann's town, where Ann",
        ]


def test_what_cannot_be_edited_is_refused(setup, tokenizer):
    model, params, covariances = setup

    def run(**options):
        return edit(model, params, tokenizer, options.pop("edits", FACTS), **options)

    with pytest.raises(ValueError, match=r"unknown way of editing 'room'. Did you mean 'rome'\?"):
        run(method="room")
    with pytest.raises(ValueError, match="there is no layer 7; layers here: 0 to 2"):
        run(method="rome", layers=[7], covariances=covariances)
    with pytest.raises(ValueError, match="rome edits one layer"):
        run(method="rome", layers=[0, 1], covariances=covariances)
    with pytest.raises(
        ValueError, match="memit needs covariances of model/layers/mlp/down_proj/kernel"
    ):
        run(method="memit")
    with pytest.raises(ValueError, match=r"the prompt '{} and {}' has {} 2 times"):
        run(edits=[Edit("{} and {}", "France", "Rome")])
    unread = {path: c.at[1].set(0.0) for path, c in covariances.items()}
    with pytest.raises(ValueError, match="those of layer 1 are of no tokens or not finite"):
        run(method="memit", layers=[0, 1], covariances=unread)
    with pytest.raises(ValueError, match="there are no edits"):
        run(edits=[])
    with pytest.raises(
        ValueError, match="no direction of layer 0's keys has a mean square below threshold=0"
    ):
        run(method="alphaedit", threshold=0.0, covariances=covariances)


def test_blanks_and_unicode_separators_of_a_file_of_edits(tmp_path):
    """An answer has one blank before it, and a line of a file ends with a line feed alone."""
    tokenizer = peft_jax.load_tokenizer("builtin:base")
    rows = [
        edit_rows(tokenizer, [p], [a])
        for p, a in (("It was in", "London"), ("It was in", " London"), ("It was in ", "London"))
    ]
    for other in rows[1:]:
        for mine, theirs in zip(rows[0], other, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    expected = tokenizer("It was in London")["input_ids"]
    assert rows[0].tokens[0, : len(expected)].tolist() == expected
    path = tmp_path / "edits.jsonl"
    record = {"prompt": "{} is in", "subject": "Big\u2028Ben", "target": "Rome"}
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8-sig")
    (edit,) = read_edits(path)
    assert edit.subject == "Big\u2028Ben"
