"""Labels and rows with them: what tables hold, what a checkpoint's classes are called, words,
questions, odd tokenizers.
"""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from peft_jax.core.options import ConfigError
from peft_jax.data import (
    Record,
    encode,
    encode_classification,
    encode_questions,
    encode_tagging,
    label_ids,
    label_names,
    read_records,
)
from peft_jax.data.records import MalformedRecordError
from peft_jax.training.tasks import wanted_labels

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "good",
    "bad",
    "film",
    "a",
    "who",
    "wrote",
    "it",
    "ann",
    "did",
]


@pytest.fixture(scope="module")
def words():
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="[SEP]", padding_side="left"
    )  # and no pad token


def records(*values):
    return [Record(v, f"data:{i}") for i, v in enumerate(values)]


def labelled(*labels):
    return records(*({"text": "a film", "label": label} for label in labels))


def test_numbers_in_a_table_are_numbers(tmp_path):
    table = tmp_path / "scores.csv"
    table.write_text("text,label\na film,0.50\ngood,3\n")
    assert label_names(read_records(str(table), kind="classification")) is None
    table.write_text("text,label\n" + "".join(f"a film,{i}\n" for i in range(11)))
    assert label_names(read_records(str(table), kind="classification")) == [
        str(i) for i in range(11)
    ]
    assert label_names(labelled(2, 10, 1.0)) == ["1", "2", "10"]
    assert label_names(labelled("2", "b", "10")) == ["10", "2", "b"]


def test_what_records_may_call_a_class():
    ids = label_ids(["negative", "Positive"])
    assert [ids[n] for n in ("negative", "positive", "Positive", "0", "1")] == [0, 1, 1, 0, 1]
    stars = label_ids(["1", "2", "3"])  # a number is the name here
    assert stars == {"1": 0, "2": 1, "3": 2}


@pytest.mark.parametrize(
    ("known", "labels", "wanted"),
    [
        (["negative", "positive"], ("positive", "NEGATIVE"), None),
        (["negative", "positive"], (0, 1), None),
        (["negative", "positive"], ("positive",), None),  # a file that lacks a class
        ([str(i) for i in range(11)], ("10", "2"), None),
        (1, (1, 2, 5), None),  # a checkpoint that regresses, and whole ratings
        (1, ("0.5", "2"), None),
        (None, (0, 1), ["0", "1"]),
        (None, (0.5, 1), 1),
        (["a", "b"], (0.5, 1.5), 1),
    ],
)
def test_the_checkpoints_classes_rule(known, labels, wanted):
    assert wanted_labels("sequence_classification", labelled(*labels), known) == wanted


def test_labels_that_the_checkpoint_does_not_know_are_shown():
    with pytest.raises(
        ConfigError,
        match=r"labels neg, pos, the checkpoint's classes are negative, positive, and 'neg'",
    ):
        wanted_labels("sequence_classification", labelled("pos", "neg"), ["negative", "positive"])
    with pytest.raises(ConfigError, match="'2' is none of them"):
        wanted_labels("sequence_classification", labelled(0, 2), ["negative", "positive"])
    assert wanted_labels("sequence_classification", labelled(1, 2), None, "numbers") == 1
    assert wanted_labels("sequence_classification", labelled(0.5, 1), None, "names") == ["0.5", "1"]


def test_a_record_with_an_unknown_label_is_passed_over_or_ends_the_run(words, caplog):
    rows = encode_classification(
        labelled("yes", "maybe", "no"), words, 6, ["no", "yes"], on_error="skip"
    )
    assert rows.labels.tolist() == [1, 0]
    assert "data:1: label 'maybe' is none of" in caplog.text
    with pytest.raises(MalformedRecordError, match="data:1: label 'maybe'"):
        encode_classification(labelled("yes", "maybe"), words, 6, ["no", "yes"])
    with pytest.raises(MalformedRecordError, match="data:0"):
        encode_classification(labelled("what"), words, 6, ["no", "yes"], on_error="skip")


def test_rows_need_no_pad_token_and_are_padded_on_the_right(words):
    assert words.pad_token_id is None
    rows = encode_classification(labelled("yes"), words, 6, ["no", "yes"])
    assert rows.tokens.tolist() == [[2, 7, 6, 3, 0, 0]]
    assert rows.segment_ids.tolist() == [[1, 1, 1, 1, 0, 0]]


def test_words_keep_apart_in_byte_level_tokenizers(shared_data, caplog):
    """As with RoBERTa's `add_prefix_space`."""
    files = shared_data / "tokenizers" / "gpt2"
    tokenizer = GPT2Tokenizer(str(files / "vocab.json"), str(files / "merges.txt"))
    sentence = records({"tokens": ["John", "lives", "in", "Berlin"], "tags": ["P", "O", "O", "L"]})
    rows = encode_tagging(sentence, tokenizer, 8, ["L", "O", "P"])
    expected = tokenizer(" John lives in Berlin")["input_ids"]
    assert rows.tokens[0, : len(expected)].tolist() == expected
    assert rows.labels[0][rows.weights[0] > 0].tolist() == [2, 1, 1, 0]
    assert not caplog.text
    encode_tagging(sentence, tokenizer, 2, ["L", "O", "P"])
    assert "2 of 4 words lie beyond data.sequence_length=2" in caplog.text


def _asked(question, context, text, start):
    return {
        "question": question,
        "context": context,
        "answers": {"text": [text], "answer_start": [start]},
    }


def test_an_answer_with_blanks_around_it_is_found(words):
    bare = encode_questions(records(_asked("who wrote it", "it ann wrote", "ann", 3)), words, 12)[0]
    blank = encode_questions(
        records(_asked("who wrote it", "it ann wrote", " ann ", 2)), words, 12
    )[0]
    assert bare.labels.tolist() == blank.labels.tolist() == [[6, 6]]


def test_a_question_without_room_for_its_context_is_passed_over_or_ends_the_run(words, caplog):
    long = _asked("who wrote it " * 5, "ann did", "ann", 0)
    asked = records(long, _asked("who wrote it", "ann did", "ann", 0))
    rows, origins = encode_questions(asked, words, 14, on_error="skip")
    assert len(rows.tokens) == 1
    assert [q.record for q in origins] == [1]
    assert "data:0: the question's 15 tokens leave 0 of data.sequence_length=14" in caplog.text
    with pytest.raises(MalformedRecordError, match="data:0"):
        encode_questions(asked, words, 14)


def test_text_gets_one_end_token(words):
    (example,) = encode(records({"text": "a film"}), words, "text")
    assert example.ids.tolist() == [2, 7, 6, 3]


@pytest.mark.parametrize("name", ["data.csv", "data.jsonl", "data.txt"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path, name):
    text = {
        "csv": "text,label\r\na film,no\r\n",
        "jsonl": json.dumps({"text": "a film", "label": "no"}) + "\r\n",
        "txt": "a film|no\r\n",
    }
    file = tmp_path / name
    file.write_text(text[file.suffix[1:]], encoding="utf-8-sig", newline="")
    delimiter = "|" if file.suffix == ".txt" else None
    found = read_records(str(file), kind="classification", delimiter=delimiter, on_error="stop")
    assert [r.value for r in found] == [{"text": "a film", "label": "no"}]


def test_a_long_field_is_one_record(tmp_path):
    lines = "\n".join(f"line {i}" for i in range(20_000))
    file = tmp_path / "long.csv"
    file.write_text(f'text,label\n"{lines}",no\n')
    (record,) = read_records(str(file), kind="classification", on_error="stop")
    assert record.value["text"] == lines


def test_unicode_separators_end_no_line(tmp_path):
    file = tmp_path / "odd.jsonl"
    file.write_text(
        json.dumps({"text": "one\u2028two\x85three"}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (record,) = read_records(str(file), kind="text", on_error="stop")
    assert record.value["text"] == "one\u2028two\x85three"
