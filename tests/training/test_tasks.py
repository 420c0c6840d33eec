"""Tasks beyond the next token: rows with labels, objectives against PyTorch's losses, metrics, and
training from YAML.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as tr
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import peft_jax
from peft_jax.adapters import prefix_tuning, prompt_tuning
from peft_jax.core.bind import Bound
from peft_jax.core.options import ConfigError
from peft_jax.data import (
    MalformedRecordError,
    Record,
    encode_classification,
    encode_masked,
    encode_pairs,
    encode_questions,
    encode_sources,
    encode_tagging,
    label_names,
    read_records,
)
from peft_jax.objectives.contrast import contrast, embed_texts
from peft_jax.objectives.labels import ANSWERS, LABELS, squared_error
from peft_jax.objectives.reading import cross_entropy
from peft_jax.objectives.tokens import TOKENS, masked_reading
from peft_jax.recipes.config import parse_config
from peft_jax.recipes.evaluate import run_evaluation, run_generation
from peft_jax.recipes.train import run_training
from peft_jax.training import metrics
from peft_jax.training.data import DataConfig, Subject
from peft_jax.training.predictions import answers, predict
from peft_jax.training.tasks import TASKS
from tests.models.test_encoders import ENCODERS, T5_SIZES, torch_encoder
from tests.reference import VOCAB, relative_error

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "good",
    "bad",
    "film",
    "a",
    "the",
    "was",
    "it",
    "no",
    "yes",
    "red",
    "un",
    "##like",
]


@pytest.fixture(scope="module")
def tokenizer():
    """A WordPiece tokenizer of a few words and letters."""
    letters = [p + c for c in "abcdefghijklmnopqrstuvwxyz?." for p in ("", "##")]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys([*WORDS, *letters]))}
    assert len(vocabulary) <= VOCAB
    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    pieces.normalizer, pieces.pre_tokenizer = (
        normalizers.Lowercase(),
        pre_tokenizers.BertPreTokenizer(),
    )
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tr.PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def records(*values):
    return [Record(v, f"made:{i}") for i, v in enumerate(values)]


REVIEWS = records(
    {"text": "the film was good", "label": "yes"},
    {"text": "bad film", "label": "no"},
    {"text": "it was a good film", "label": "yes"},
)
TAGGED = records(
    {"tokens": ["the", "unlike", "film"], "tags": ["DET", "ADJ", "NOUN"]},
    {"tokens": ["it", "was"], "tags": ["PRON", "VERB"]},
)
ASKED = records(
    {
        "question": "was it good?",
        "context": "the film was red. it was no good film",
        "answers": {"text": ["no good"], "answer_start": [25]},
    },
    {
        "question": "what?",
        "context": "a bad film",
        "answers": {"text": ["bad film"], "answer_start": [2]},
    },
)


def loaded(name, task, folder, **options):
    torch_encoder(name, task).save_pretrained(folder)
    return peft_jax.load(folder, **options)


def theirs(name, task, folder):
    auto = {
        "sequence_classification": tr.AutoModelForSequenceClassification,
        "token_classification": tr.AutoModelForTokenClassification,
        "question_answering": tr.AutoModelForQuestionAnswering,
    }[task]
    return auto.from_pretrained(folder, attn_implementation="eager").eval()


def tensors(rows, **more):
    inputs = {
        "input_ids": rows.tokens,
        "attention_mask": rows.segment_ids,
        "token_type_ids": rows.token_type_ids,
    }
    return {k: torch.tensor(v).long() for k, v in (inputs | more).items()}


# --------------------------------------------------------------------------------------------------
# rows


def test_labels_are_named_in_order_and_numbers_with_fractions_are_not():
    assert label_names(REVIEWS) == ["no", "yes"]
    assert label_names(TAGGED, "tags") == ["ADJ", "DET", "NOUN", "PRON", "VERB"]
    assert label_names(records({"label": 2}, {"label": 0}, {"label": 10.0})) == ["0", "2", "10"]
    assert label_names(records({"label": 0.5}, {"label": 1})) is None


def test_rows_of_texts_and_pairs(tokenizer):
    rows = encode_classification(REVIEWS, tokenizer, 8, ["no", "yes"])
    assert rows.labels.tolist() == [1, 0, 1]
    assert rows.tokens[1].tolist() == [2, 6, 7, 3, 0, 0, 0, 0]
    assert rows.segment_ids[1].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    pair = encode_classification(
        records({"text": "a film", "text_pair": "bad", "label": 0.5}), tokenizer, 8, None
    )
    assert pair.token_type_ids[0].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    assert pair.labels.dtype == np.float32
    with pytest.raises(MalformedRecordError, match="made:0: label 'yes' is none of no, maybe"):
        encode_classification(REVIEWS, tokenizer, 8, ["no", "maybe"])
    with pytest.raises(ValueError, match="some records have a text_pair and others none"):
        encode_classification(
            [*REVIEWS, *records({"text": "a", "text_pair": "b", "label": "no"})],
            tokenizer,
            8,
            ["no", "yes"],
        )
    with pytest.raises(MalformedRecordError, match="made:0: label 'high' is no number"):
        encode_classification(records({"text": "a", "label": "high"}), tokenizer, 8, None)


def test_tags_lie_at_the_first_token_of_each_word(tokenizer):
    rows = encode_tagging(TAGGED, tokenizer, 8, label_names(TAGGED, "tags"))
    assert tokenizer.convert_ids_to_tokens(rows.tokens[0])[:6] == [
        "[CLS]",
        "the",
        "un",
        "##like",
        "film",
        "[SEP]",
    ]
    assert rows.weights[0].tolist() == [0, 1, 1, 0, 1, 0, 0, 0]
    assert rows.labels[0][[1, 2, 4]].tolist() == [1, 0, 2]


def test_answers_are_found_again_in_windows(tokenizer):
    rows, origins = encode_questions(ASKED, tokenizer, 14, stride=3)
    assert len({o.record for o in origins}) == 2 < len(origins)
    found = set()
    for o in origins:
        first, last = rows.labels[o.row]
        if (first, last) != (0, 0):
            context = ASKED[o.record].value["context"]
            assert (
                context[o.offsets[first, 0] : o.offsets[last, 1]]
                == ASKED[o.record].value["answers"]["text"][0]
            )
            found.add(o.record)
    assert found == {0, 1}


def test_blanks_of_an_answer_are_no_part_of_it(tokenizer):
    value = {
        "question": "was it good?",
        "context": "the film was good",
        "answers": {"text": [" film "], "answer_start": [3]},
    }
    rows, _ = encode_questions(records(value), tokenizer, 14)
    first, last = rows.labels[0]
    assert tokenizer.convert_ids_to_tokens(rows.tokens[0, first : last + 1]) == ["film"]


def test_masked_rows_spare_special_tokens(tokenizer):
    rows = encode_masked(records({"text": "the film was good " * 6}), tokenizer, 10)
    assert len(rows.tokens) == 3
    assert rows.weights.sum() == 24
    assert not rows.weights[np.isin(rows.tokens, [0, 2, 3])].any()
    tokenizer = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]")
    with pytest.raises(ValueError, match="the tokenizer has no mask token"):
        encode_masked(REVIEWS, tokenizer, 10)


def test_sources_and_targets(tokenizer):
    rows = encode_sources(records({"prompt": "a film", "completion": "good"}), tokenizer, 6, 0, 3)
    assert rows.tokens[0].tolist() == [2, 8, 7, 3, 0, 0]
    assert rows.targets[0].tolist() == [5, 0, 0]
    assert rows.decoder_tokens[0].tolist() == [0, 0, 0]
    assert rows.weights[0].tolist() == [1, 0, 0]


def test_conllu_is_read_by_sentence(tmp_path):
    file = tmp_path / "bank.conllu"
    row = "{}\t{}\t_\t{}\t_\t_\t0\troot\t_\t_\n"
    good = (
        "# sent_id = blog-1\n"
        + row.format(1, "It", "PRON")
        + row.format("2-3", "isn't", "_")
        + row.format(2, "is", "AUX")
    )
    file.write_text(good + "\n1\ttoo\tfew\n\n# sent_id = mail-2\n" + row.format(1, "No", "INTJ"))
    found = read_records(str(file), kind="tagging", columns={"tags": "upos"})
    assert [r.value for r in found] == [
        {"tokens": ["It", "is"], "tags": ["PRON", "AUX"]},
        {"tokens": ["No"], "tags": ["INTJ"]},
    ]
    assert found[1].origin == f"{file}:8"
    with pytest.raises(MalformedRecordError, match=r"bank.conllu:6: 3 columns, CoNLL-U has 10"):
        read_records(str(file), kind="tagging", columns={"tags": "upos"}, on_error="stop")


def test_heads_are_tags_by_distance(tmp_path):
    file, row = tmp_path / "bank.conllu", "{}\tw\t_\t_\t_\t_\t{}\t_\t_\t_\n"
    file.write_text("".join(row.format(i, h) for i, h in enumerate((2, 0, 12, 3, *[1] * 8), 1)))
    found = read_records(str(file), kind="tagging", columns={"tags": "head_offset"})
    assert found[0].value["tags"][:5] == ["+1", "root", "far+", "-1", "-4"]
    assert found[0].value["tags"][-3:] == ["far-"] * 3
    for head, message in (
        ("x", "bank.conllu:1: the head 'x' is no word's number"),
        ("9", "the head 9 is none of the sentence's 1"),
    ):
        file.write_text(row.format(1, head))
        with pytest.raises(MalformedRecordError, match=message):
            read_records(
                str(file), kind="tagging", columns={"tags": "head_offset"}, on_error="stop"
            )


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("classification", {"text": "a", "label": None}, "'label' is neither a name nor a number"),
        ("classification", {"text": 1, "label": "a"}, "'text' is no text"),
        ("classification", {"text": "a"}, "no field 'label'"),
        ("tagging", {"tokens": "a b", "tags": ["X"]}, "'tokens' is no list of words"),
        ("tagging", {"tokens": ["a", "b"], "tags": ["X"]}, "2 tokens and 1 tags"),
        (
            "question_answering",
            {"question": "q", "context": "c", "answers": {}},
            "'answers' should hold text and answer_start",
        ),
        (
            "question_answering",
            {"question": "q", "context": "c", "answers": {"text": ["d"], "answer_start": [0]}},
            "the context does not hold 'd' at 0",
        ),
        ("pairs", {"anchor": "a", "positive": 3}, "'positive' is no text"),
    ],
)
def test_malformed_records_are_named(kind, value, message, tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps(value) + "\n")
    with pytest.raises(MalformedRecordError, match=rf"data.jsonl:1: .*{message}"):
        read_records(str(tmp_path / "data.jsonl"), kind=kind, on_error="stop")


# --------------------------------------------------------------------------------------------------
# objectives


def test_losses_of_labels_tags_and_answers_match_pytorch(tokenizer, tmp_path):
    rows = {
        "sequence_classification": encode_classification(
            REVIEWS, tokenizer, 10, ["no", "yes", "other"]
        ),
        "token_classification": encode_tagging(TAGGED, tokenizer, 10, label_names(TAGGED, "tags")),
        "question_answering": encode_questions(ASKED, tokenizer, 24)[0],
    }
    for task, made in rows.items():
        model, params = loaded("bert", task, tmp_path / task)
        reading = ANSWERS if task == "question_answering" else LABELS
        loss, seen = jax.jit(functools.partial(cross_entropy, reading, peft_jax.bind(model)))(
            params, made._asdict(), None
        )
        labels = (
            {"labels": np.where(made.weights > 0, made.labels, -100)}
            if task != "question_answering"
            else {"start_positions": made.labels[:, 0], "end_positions": made.labels[:, 1]}
        )
        reference = theirs("bert", task, tmp_path / task)
        with torch.no_grad():
            expected = reference(**tensors(made, **labels)).loss.item()
        if (
            task == "question_answering"
        ):  # PyTorch's has the padding in its softmax; ours leaves it out
            with torch.no_grad():
                out = reference(**tensors(made))
            hidden = torch.tensor(made.segment_ids) == 0
            ends = [x.masked_fill(hidden, -1e9) for x in (out.start_logits, out.end_logits)]
            labels = [torch.tensor(made.labels[:, i]).long() for i in (0, 1)]
            expected = (
                sum(
                    torch.nn.functional.cross_entropy(e, y).item()
                    for e, y in zip(ends, labels, strict=True)
                )
                / 2
            )
        assert abs(float(loss) - expected) < 1e-4 * abs(expected)
        assert float(seen["weight"]) == made.weights.sum()


def test_the_loss_of_numbers_matches_pytorch(tokenizer, tmp_path):
    made = encode_classification(
        records({"text": "good", "label": 0.5}, {"text": "bad film", "label": -1}),
        tokenizer,
        8,
        None,
    )
    model, params = loaded("distilbert", "sequence_classification", tmp_path, labels=1)
    batch = {k: v for k, v in made._asdict().items() if k != "token_type_ids"}
    loss, _ = squared_error(peft_jax.bind(model), params, batch, None)
    values = peft_jax.bind(model)(params, made.tokens, segment_ids=made.segment_ids)[:, 0]
    assert float(loss) == pytest.approx(
        float(((np.asarray(values) - made.labels) ** 2).mean()), rel=1e-5
    )


def test_masking_hits_the_wanted_share_and_spares_the_rest(tokenizer, tmp_path):
    rows = encode_masked(records({"text": "the film was good " * 30}), tokenizer, 32)
    seen = []

    def apply(params, tokens, *, rng=None, method=None, **_):
        if method == "unembed":
            return jnp.zeros((*tokens.shape[:-1], VOCAB))
        seen.append(np.asarray(tokens))
        return jnp.zeros((*tokens.shape, 4))

    apply = Bound.of(apply, hidden_states=True)
    objective = functools.partial(
        cross_entropy, masked_reading(mask_token=4, vocab_size=VOCAB, share=0.2)
    )
    loss, found = objective(apply, None, rows._asdict(), jax.random.key(0))
    assert float(loss) == pytest.approx(np.log(VOCAB), rel=1e-5)
    changed = seen[0] != rows.tokens
    assert not changed[rows.weights == 0].any()
    full = rows.weights.sum(-1) == 30
    assert float(found["weight"]) == pytest.approx(0.2 * rows.weights.sum(), abs=len(rows.tokens))
    assert 0.5 < (seen[0][full] == 4).sum() / (0.2 * 30 * full.sum()) <= 1.0
    objective(apply, None, rows._asdict(), jax.random.key(1))
    assert (seen[0] != seen[1]).any()
    for _ in range(2):
        objective(apply, None, rows._asdict(), None)
    np.testing.assert_array_equal(seen[2], seen[3])


def test_masked_logits_are_those_of_the_whole_row(tokenizer, tmp_path):
    model, params = loaded("roberta", "masked_lm", tmp_path)
    apply = peft_jax.bind(model)
    hidden = apply(params, np.arange(6)[None] + 5, method="hidden")
    whole = apply(params, np.arange(6)[None] + 5)
    assert relative_error(apply(params, hidden[:, 2:4], method="unembed"), whole[:, 2:4]) < 1e-5


def test_contrast_is_the_cross_entropy_of_cosines(tokenizer, tmp_path):
    made = encode_pairs(
        records(
            *(
                {"anchor": a, "positive": b}
                for a, b in (("good film", "it was good"), ("bad", "no"), ("red", "a"))
            )
        ),
        tokenizer,
        8,
    )
    model, params = loaded("modernbert", "feature_extraction", tmp_path)
    apply = peft_jax.bind(model)
    loss, found = contrast(apply, params, made._asdict(), None, temperature=0.1)
    a, b = (
        np.asarray(embed_texts(apply, params, t, s), np.float64)
        for t, s in ((made.tokens, made.segment_ids), (made.other_tokens, made.other_segment_ids))
    )
    np.testing.assert_allclose(np.linalg.norm(a, axis=-1), 1.0, rtol=1e-5)
    scores = a @ b.T / 0.1

    def log(s):
        return -np.diag(s - np.log(np.exp(s).sum(-1, keepdims=True))).mean()

    assert float(loss) == pytest.approx((log(scores) + log(scores.T)) / 2, rel=1e-4)
    short = {
        k: np.concatenate([v, np.zeros_like(v[:1])]) for k, v in made._asdict().items()
    }  # a row that pads the batch
    again, _ = contrast(apply, params, short, None, temperature=0.1)
    assert float(again) == pytest.approx(float(loss), rel=1e-5)


def test_the_loss_of_targets_matches_pytorch(tokenizer, tmp_path):
    torch.manual_seed(0)
    reference = tr.T5ForConditionalGeneration(tr.T5Config(**T5_SIZES)).eval()
    reference.save_pretrained(tmp_path)
    model, params = peft_jax.load(tmp_path)
    made = encode_sources(
        records(
            {"prompt": "a film", "completion": "good"}, {"prompt": "bad", "completion": "it was no"}
        ),
        tokenizer,
        8,
        0,
        5,
    )
    loss, _ = cross_entropy(TOKENS, peft_jax.bind(model), params, made._asdict(), None)
    with torch.no_grad():
        out = reference(
            input_ids=torch.tensor(made.tokens),
            attention_mask=torch.tensor(made.segment_ids),
            decoder_input_ids=torch.tensor(made.decoder_tokens),
            labels=torch.tensor(np.where(made.weights > 0, made.targets, -100)).long(),
        )
    assert float(loss) == pytest.approx(out.loss.item(), rel=1e-4)


def test_t5_generates_as_pytorch_does(tokenizer, tmp_path):
    torch.manual_seed(0)
    reference = tr.T5ForConditionalGeneration(tr.T5Config(**T5_SIZES, num_decoder_layers=2)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    reference.save_pretrained(tmp_path)
    model, params = peft_jax.load(tmp_path)
    prompts = [[5, 6, 7, 1], [9, 10, 11, 12, 13, 1]]
    ours = peft_jax.generate(model, params, prompts, max_tokens=12)
    for prompt, row in zip(prompts, ours, strict=True):
        out = reference.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert row == out[0, 1:].tolist()
    prompted = prompt_tuning(params, jax.random.key(0), num_virtual_tokens=3)
    prefixed = prefix_tuning(params, jax.random.key(0), num_virtual_tokens=3, init_std=1.0)
    for tree in (prompted, prefixed):
        other = peft_jax.generate(model, tree, prompts, max_tokens=5)
        tokens, apply = np.asarray([prompts[0]]), jax.jit(peft_jax.bind(model))
        logits = apply(tree, tokens, np.asarray([[0, *other[0][:-1]]]))[0]
        assert other[0] == logits.argmax(-1).tolist()


# --------------------------------------------------------------------------------------------------
# metrics


def test_metrics():
    assert metrics.accuracy([1, 2, 3], [1, 2, 4], 5) == pytest.approx(2 / 3)
    assert metrics.f1([1, 1, 0, 0], [1, 0, 0, 0], 2) == pytest.approx(2 / 3)
    assert metrics.f1([0, 1, 2], [0, 1, 1], 3) == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert metrics.matthews([1, 0, 1, 0], [1, 0, 1, 0], 2) == pytest.approx(1.0)
    assert metrics.pearson([1.0, 2.0, 3.0], [2.0, 4.0, 6.1]) == pytest.approx(0.9999, abs=1e-3)
    assert metrics.spearman([1.0, 2.0, 3.0], [1.0, 10.0, 100.0]) == pytest.approx(1.0)
    assert metrics.seqeval([["B-X", "I-X", "O"]], [["B-X", "I-X", "O"]]) == 1.0
    assert metrics.seqeval([["B-X", "O", "O"]], [["B-X", "I-X", "O"]]) == 0.0
    assert metrics.answer_exact_match("The Film!", ["film"]) == 1.0
    assert metrics.answer_f1("a red film", ["red house", "blue"]) == pytest.approx(0.5)


def test_answers_are_the_best_spans(tokenizer, tmp_path):
    model, params = loaded("bert", "question_answering", tmp_path)
    subject = Subject(model, tokenizer, DataConfig(sequence_length=24), 2, None)
    rows, origins = encode_questions(ASKED, tokenizer, 24)
    logits = predict(subject, params, rows)
    for text, origin in zip(answers(subject, params, ASKED), origins, strict=True):
        inside = np.flatnonzero(origin.offsets[:, 0] >= 0)
        spans = [
            (logits[origin.row, i, 0] + logits[origin.row, j, 1], i, j)
            for i in inside
            for j in inside
            if i <= j
        ]
        _, i, j = max(spans)
        context = ASKED[origin.record].value["context"]
        assert text == context[origin.offsets[i, 0] : origin.offsets[j, 1]]


# --------------------------------------------------------------------------------------------------
# whole runs


@pytest.fixture(scope="module")
def encoder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    tr.BertForMaskedLM(ENCODERS["bert"](hidden_dropout_prob=0.0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def data_file(folder, kind):
    made = {
        "text": [{"text": "the film was good. it was a bad film."}],
        "classification": [r.value for r in REVIEWS],
        "numbers": [
            {"text": "good film", "label": 0.9},
            {"text": "bad film", "label": 0.1},
            {"text": "it was", "label": 0.5},
        ],
        "tagging": [r.value for r in TAGGED],
        "question_answering": [r.value for r in ASKED],
        "pairs": [
            {"anchor": "good film", "positive": "it was good"},
            {"anchor": "bad", "positive": "no"},
        ],
        "completion": [
            {"prompt": "a film", "completion": "good"},
            {"prompt": "bad", "completion": "no"},
        ],
    }[kind]
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(v) + "\n" for v in made * 6))
    return {"path": str(path)}


RUNS = {
    "masked_lm": ("text", {"perplexity"}),
    "sequence_classification": ("classification", {"accuracy", "f1"}),
    "regression": ("numbers", {"pearson", "spearman"}),
    "token_classification": ("tagging", {"accuracy", "f1"}),
    "question_answering": ("question_answering", {"exact_match", "f1"}),
    "feature_extraction": ("pairs", {"retrieval"}),
}


@pytest.mark.parametrize("run", ["sequence_classification", "token_classification"])
def test_an_encoder_learns_with_knowledge_beside(run, encoder, tmp_path):
    """K-BERT's triples with vectors of entities, or with a lexicon of labels."""
    kind, _ = RUNS[run]
    source = data_file(tmp_path, kind)
    (tmp_path / "facts.jsonl").write_text(
        json.dumps({"subject": "film", "relation": "is", "object": "good"}) + "\n"
    )
    np.savez(tmp_path / "e.npz", names=np.asarray(["film", "good"]), vectors=np.eye(2))
    (tmp_path / "lexicon.tsv").write_text(f"film\t{TAGGED[0].value['tags'][0]}\n")
    more = (
        {"entities": str(tmp_path / "e.npz")}
        if kind == "classification"
        else {"lexicon": str(tmp_path / "lexicon.tsv")}
    )
    tree = {
        "output": str(tmp_path / "run"),
        "model": {"path": str(encoder), "task": run},
        "method": {"name": "lora", "rank": 2, "targets": ["query", "value"]},
        "mesh": {"data": 1, "fsdp": 2, "tensor": 4},
        "data": {
            "train": source,
            "validation": source,
            "sequence_length": 24,
            "knowledge": {
                "triples": {"path": str(tmp_path / "facts.jsonl")},
                "triples_room": 8,
                **more,
            },
        },
        "optimizer": {"learning_rate": 0.02, "warmup_steps": 1},
        "train": {"steps": 4, "batch_size": 4, "log_every": 1, "tensorboard": False},
    }
    run_training(parse_config(tree))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["after"]["loss"] < results["before"]["loss"]
    steps = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert ("prior" in steps[0]) == (kind == "tagging")


@pytest.mark.parametrize("task", ["masked_lm", "sequence_classification"])
def test_an_encoder_learns_facts(task, encoder, tmp_path):
    """K-Adapter's tasks: the masked object of a fact in words, and the relation that two things
    have.
    """
    facts = [
        {"subject": s, "relation": r, "object": o}
        for s, r, o in (("film", "is", "good"), ("it", "was", "bad"))
    ]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(f) + "\n" for f in facts * 4))
    templates = {
        r: [
            f"{{{{ subject }}}} {r} {{{{ object }}}} ?",
            f"the {{{{ subject }}}} {r} {{{{ object }}}}",
        ]
        for r in ("is", "was")
    }
    (tmp_path / "templates.yaml").write_text(json.dumps(templates))
    source = {"path": str(tmp_path / "facts.jsonl")}
    tree = {
        "output": str(tmp_path / "run"),
        "model": {"path": str(encoder), "task": task},
        "method": {"name": "full"},  # an adapter has nothing to hold on to in a random model
        "mesh": {"data": 1, "fsdp": 2, "tensor": 4},
        "data": {
            "kind": "facts",
            "train": source,
            "validation": {**source, "phrasing": "train"},
            "sequence_length": 16,
            "mask_share": 1.0,
            "templates": str(tmp_path / "templates.yaml"),
        },
        "optimizer": {"learning_rate": 0.003, "warmup_steps": 1},
        "train": {"steps": 40, "batch_size": 4, "log_every": 40, "tensorboard": False},
    }
    run_training(parse_config(tree))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["after"]["loss"] < 0.3 * results["before"]["loss"]
    tree["data"]["knowledge"] = {"allowed_weight": 1.0}
    with pytest.raises(
        ConfigError, match=f"allowed_weight is for causal language models, not a {task} model"
    ):
        run_evaluation(parse_config(tree))


def test_only_objects_of_facts_are_masked(tokenizer):
    value = {
        "prompt": "the film was",
        "completion": " good. it",
        "object_at": (1, 5),
        "relation": "was",
    }
    again = {
        "prompt": "a",
        "completion": " good film was good",
        "object_at": (15, 19),
    }  # it is there before, too
    rows = encode_masked([Record(value, ""), Record(again, "")], tokenizer, 12)
    for row, (tokens, weights) in enumerate(zip(rows.tokens, rows.weights, strict=True)):
        assert (
            tokens[weights > 0].tolist() == tokenizer("good", add_special_tokens=False)["input_ids"]
        ), row
    assert weights.argmax() == 5  # after [CLS] a good film was


@pytest.mark.parametrize("run", RUNS)
def test_a_task_trains_is_measured_and_comes_back(run, encoder, tmp_path):
    kind, wanted = RUNS[run]
    task = "sequence_classification" if run == "regression" else run
    source = data_file(tmp_path, kind)
    tree = {
        "output": str(tmp_path / "run"),
        "model": {"path": str(encoder), "task": task},
        "method": {"name": "lora", "rank": 2, "targets": ["query", "value"]},
        "mesh": {"data": 1, "fsdp": 2, "tensor": 4},
        "data": {"train": source, "validation": source, "sequence_length": 24},
        "optimizer": {"learning_rate": 0.02, "warmup_steps": 1},
        "train": {"steps": 4, "batch_size": 4, "log_every": 2, "tensorboard": False},
    }
    run_training(parse_config(tree))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert wanted <= set(results["after"])
    assert results["after"]["loss"] < results["before"]["loss"]
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    expected = {
        "masked_lm": None,
        "feature_extraction": "FEATURE_EXTRACTION",
        "token_classification": "TOKEN_CLS",
        "question_answering": "QUESTION_ANS",
    }.get(run, "SEQ_CLS")
    assert config["task_type"] == expected
    if run not in ("masked_lm", "feature_extraction"):
        assert config["modules_to_save"]
        # the labels are in no adapter: the configuration has them
        labels = {
            "labels": (
                TASKS[task].labels
                and label_names(
                    read_records(source["path"], kind=TASKS[task].kinds[0]), TASKS[task].labels
                )
            )
            or []
        }
        tree["data"] |= {k: v for k, v in labels.items() if v}
    again = run_evaluation(
        parse_config(
            tree | {"model": tree["model"] | {"adapter": str(tmp_path / "run" / "adapter")}}
        )
    )
    assert again["loss"] == pytest.approx(results["after"]["loss"], rel=1e-3)
    for name in wanted:
        assert again[name] == pytest.approx(results["after"][name], abs=2e-2)
    if run == "sequence_classification":
        shown = run_generation(
            parse_config(tree | {"generate": {"prompts": ["good film", "bad film"]}})
        )
        assert {s.strip() for s in shown} <= {"-> no", "-> yes"}


def test_an_encoder_decoder_trains_and_generates(tokenizer, tmp_path):
    torch.manual_seed(0)
    tr.T5ForConditionalGeneration(tr.T5Config(**T5_SIZES)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    source = data_file(tmp_path, "completion")
    tree = {
        "output": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "base")},
        "method": {"name": "lora", "rank": 2, "targets": ["q", "v"]},
        "data": {"train": source, "validation": source, "sequence_length": 8},
        "train": {"steps": 3, "batch_size": 8, "log_every": 2, "tensorboard": False},
        "evaluate": {"metrics": ["perplexity", "exact_match"], "max_tokens": 4},
        "generate": {"prompts": ["a film"], "max_tokens": 4},
    }
    run_training(parse_config(tree))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["after"]["loss"] < results["before"]["loss"]
    assert "exact_match" in results["after"]
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    tree["data"]["knowledge"] = {"triples": source}
    with pytest.raises(
        ConfigError,
        match="triples and entities are for encoders and decoders, not for encoder-decoders",
    ):
        run_generation(parse_config(tree))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.task": "causal_lm"}, "a bert model has no head for 'causal_lm'"),
        (
            {"data.kind": "chat"},
            "option 'data.kind': a sequence_classification model learns from classification or "
            "facts records, not chat",
        ),
        (
            {"evaluate.metrics": ["bleu"]},
            "a sequence_classification model has no 'bleu'; it has accuracy, f1",
        ),
        (
            {"evaluate.metrics": ["pearson"]},
            "the metric pearson is none of labels; there are accuracy, f1, matthews",
        ),
        (
            {"data.labels": ["no", "maybe"], "data.on_error": "stop"},
            "label 'yes' is none of no, maybe",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes, message, encoder, tmp_path):
    source = data_file(tmp_path, "classification")
    tree = {
        "output": str(tmp_path / "run"),
        "model": {"path": str(encoder), "task": "sequence_classification"},
        "data": {"train": source, "validation": source, "sequence_length": 8},
        "mesh": {"data": 1, "fsdp": 2, "tensor": 4},
        "train": {"steps": 1, "batch_size": 4},
    }
    for key, value in changes.items():
        section, _, name = key.partition(".")
        tree[section] = tree.get(section, {}) | {name: value}
    with pytest.raises((ConfigError, ValueError), match=message):
        run_evaluation(parse_config(tree))
