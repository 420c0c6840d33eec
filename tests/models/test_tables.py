"""Ids, positions and labels that a model has no row for are refused, with both sizes."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers as tr

import peft_jax
from peft_jax.adapters import prompt_tuning
from peft_jax.cli import USER_ERRORS
from peft_jax.data.encode import Rows
from peft_jax.data.labelled import LabelledRows
from peft_jax.models.tables import check_continued, check_prompts, check_rows, first_position
from peft_jax.recipes.config import parse_config
from peft_jax.recipes.evaluate import run_evaluation, run_generation
from peft_jax.recipes.inject import run_injection
from peft_jax.recipes.prune import run_pruning
from peft_jax.recipes.teach import run_teaching
from peft_jax.recipes.train import run_training
from peft_jax.training.config import TrainConfig
from peft_jax.training.evaluate import perplexity
from peft_jax.training.loop import train
from tests.models.test_encoders import ENCODERS
from tests.reference import FAMILIES, family_checkpoint, tiny_llama_folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of 300 rows with a tokenizer of more."""
    return tiny_llama_folder(tmp_path_factory.mktemp("small"), vocab_size=300)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A GPT-2 of 64 positions."""
    return peft_jax.load(family_checkpoint("gpt2", tmp_path_factory.mktemp("gpt2"))[0])


def rows(length=8, **changes):
    fields = {name: np.ones((2, length), np.int32) for name in Rows._fields}
    fields["positions"] = np.broadcast_to(np.arange(length, dtype=np.int32), (2, length))
    return Rows(**{**fields, **changes})


def configuration(folder, output, **changes):
    data = {
        "train": {"path": "builtin:countries", "limit": 8},
        "validation": None,
        "kind": "completion",
        "sequence_length": 32,
    }
    return parse_config(
        {
            "output": str(output),
            "model": {"path": str(folder)},
            "method": {"rank": 2},
            "data": data,
            "train": {"steps": 1, "batch_size": 8},
            **changes,
        }
    )


SIZES = (
    r"the model's embedding has 300 rows and the tokenizer 4096 tokens: use the model's "
    r"own tokenizer"
)
HELD = {
    "data": {
        "train": {"path": "builtin:countries", "limit": 8},
        "validation": {"path": "builtin:countries", "limit": 8},
        "kind": "completion",
        "sequence_length": 32,
    }
}
VERBS = {
    "train": (run_training, {}),
    "evaluate": (run_evaluation, HELD),
    "prune": (run_pruning, {"prune": {"sparsity": 0.5}}),
    "teach": (run_teaching, {"distill": {"teachers": [{"path": "SMALL"}]}}),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_tokenizer_larger_than_the_model_is_refused_at_set_up(small, verb, tmp_path):
    run, changes = VERBS[verb]
    config = configuration(
        small, tmp_path, **json.loads(json.dumps(changes).replace("SMALL", str(small)))
    )
    with pytest.raises(USER_ERRORS, match=SIZES):
        run(config)
    assert not (tmp_path / "config.yaml").exists()


def test_prompts_and_facts_are_checked_too(small, tmp_path):
    with pytest.raises(
        ValueError, match=r"the prompts hold \d+, and the model's embedding has 300 rows"
    ):
        run_generation(
            configuration(small, tmp_path, generate={"prompts": ["What is the capital of France?"]})
        )
    facts = tmp_path / "facts.jsonl"
    facts.write_text(json.dumps({"subject": "Ada", "relation": "lives_in", "object": "Paris"}))
    (tmp_path / "templates.yaml").write_text(
        "lives_in: ['{{ subject }} lives in {{ object }}', 'home of {{ subject }}: {{ object }}']"
    )
    data = {
        "kind": "facts",
        "train": {"path": str(facts)},
        "templates": str(tmp_path / "templates.yaml"),
        "validation": None,
    }
    with pytest.raises(ValueError, match=SIZES):
        run_injection(configuration(small, tmp_path / "out", data=data))


def test_a_teacher_of_a_smaller_vocabulary_is_refused(tiny_folder, small, tmp_path):
    with pytest.raises(ValueError, match=SIZES):
        run_training(
            configuration(tiny_folder, tmp_path, distill={"teachers": [{"path": str(small)}]})
        )


def test_learned_positions_shorter_than_a_row(gpt2):
    model, params = gpt2
    check_rows(model, rows(64))
    message = (
        "the rows have 65 positions and the model has learned 64: set "
        "data.sequence_length to 64 or less"
    )
    for run in (
        lambda: train(
            model, peft_jax.lora(params, jax.random.key(0)), rows(65), None, TrainConfig(), steps=1
        ),
        lambda: perplexity(model, params, rows(65)),
    ):
        with pytest.raises(ValueError, match=message):
            run()
    check_rows(
        model, rows(80, positions=np.tile(np.arange(40, dtype=np.int32), (2, 2)))
    )  # two packed examples


def test_prompts_are_counted_with_what_stands_before_them(gpt2):
    model, params = gpt2
    check_prompts(model, params, [[5] * 60], 5)
    with pytest.raises(
        ValueError,
        match="a prompt of 60 tokens and max_tokens=6 need 65 positions, and the model has "
        "learned 64",
    ):
        peft_jax.generate(model, params, [[5] * 60], max_tokens=6)
    virtual = prompt_tuning(params, jax.random.key(0), num_virtual_tokens=3)
    assert first_position(virtual) == 3
    with pytest.raises(
        ValueError, match="a prompt of 60 tokens after 3 virtual ones and max_tokens=5 need 67"
    ):
        peft_jax.generate(model, virtual, [[5] * 60], max_tokens=5)
    with pytest.raises(
        ValueError,
        match=r"after 3 virtual ones, and the model has learned 64: set data.sequence_length to 61",
    ):
        perplexity(model, virtual, rows(64))
    with pytest.raises(
        ValueError, match="writes 60 tokens after up to 8, and the model has learned 64 positions"
    ):
        check_continued(model, rows(), 8, 60)


@pytest.mark.parametrize("ids", [[5, 96], [5, -1]])
def test_ids_of_users_are_refused_where_they_are_no_rows(gpt2, ids):
    model, params = gpt2
    with pytest.raises(
        ValueError,
        match=r"the prompts hold (96, and the model's embedding has 96 rows|-1, and nothing is "
        r"below 0)",
    ):
        peft_jax.generate(model, params, [ids], max_tokens=2)
    with pytest.raises(ValueError, match="the rows' tokens hold"):
        perplexity(model, params, rows(2, tokens=np.asarray([ids, ids], np.int32)))
    with pytest.raises(ValueError, match="the rows' targets hold"):
        perplexity(model, params, rows(2, targets=np.asarray([ids, ids], np.int32)))


def test_labels_and_types_are_checked():
    config = SimpleNamespace(vocab_size=50, num_labels=3, type_vocab_size=2, learned_positions=16)
    model = SimpleNamespace(config=config, task="sequence_classification")
    ones = np.ones((2, 8), np.int32)
    made = LabelledRows(ones, ones, ones, np.asarray([0, 2], np.int32), np.ones(2, np.float32))
    check_rows(model, made)
    with pytest.raises(ValueError, match="labels hold 3, and the model's head has 3 classes"):
        check_rows(model, made._replace(labels=np.asarray([0, 3], np.int32)))
    with pytest.raises(ValueError, match="labels hold -100, and nothing is below 0"):
        check_rows(model, made._replace(labels=np.asarray([0, -100], np.int32)))
    with pytest.raises(ValueError, match="token_type_ids hold 2, and the model has 2 types"):
        check_rows(model, made._replace(token_type_ids=2 * ones))
    model.task = "question_answering"
    with pytest.raises(ValueError, match="labels hold 8, and a row has 8 tokens"):
        check_rows(model, made._replace(labels=np.asarray([[0, 8], [1, 2]], np.int32)))


@pytest.mark.parametrize(
    "name", ["gpt2", "bert", "roberta", "distilbert", "modernbert", "deberta_v3", "llama2"]
)
def test_a_family_says_how_many_positions_its_checkpoint_learned(name, tmp_path):
    """By PyTorch: the longest row that it reads (RoBERTa's first rows of the table are its
    padding's).
    """
    hf = FAMILIES[name]() if name in FAMILIES else ENCODERS[name]()
    theirs = tr.AutoModel.from_config(hf)
    tables = [
        m
        for n, m in theirs.named_modules()
        if n.endswith(("wpe", "position_embeddings")) and hasattr(m, "weight")
    ]
    offset = 0 if name != "roberta" else hf.pad_token_id + 1
    tr.AutoModelForMaskedLM.from_config(hf).save_pretrained(tmp_path) if name in ENCODERS else (
        tr.AutoModelForCausalLM.from_config(hf).save_pretrained(tmp_path)
    )
    model, _ = peft_jax.load(tmp_path)
    assert model.config.learned_positions == (tables[0].num_embeddings - offset if tables else None)


def test_a_quantized_embedding_clamps_no_id():
    table = jax.random.normal(jax.random.key(0), (8, 16))
    for w in (table, peft_jax.quantize({"embedding": table}, "int8", targets="*")["embedding"]):
        taken = peft_jax.core.weight.take(w, jnp.asarray([7, 8]))
        np.testing.assert_array_equal(np.isfinite(np.asarray(taken)).all(-1), [True, False])
