"""Files that are not as they should be: the file, the line and the reason are named, and reading
goes on or stops as it is told.
"""

import gzip
import json
import logging

import pytest

from peft_jax.data import MalformedRecordError, encode, read_records
from tests.data.trl_templates import tokenizer_of

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
LINE = json.dumps(GOOD).encode()


def chat(*turns):
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}).encode()


# The second line of three, and what is said of it.
LINES = {
    "cut JSON": (LINE[:40], "not valid JSON"),
    "wrong encoding": ('{"text": "café"}'.encode("latin-1"), r"not UTF-8 \(byte 0xe9 at column"),
    "NUL bytes": (LINE.replace(b'"a"', b'"a\0"'), "not valid JSON .Invalid control character"),
    "no object": (b"[1, 2]", "expected an object, found list"),
    "a number": (b"3", "expected an object, found int"),
    "another format": (b'{"text": "x"}', r"no field 'messages' .fields here: text, a text record"),
    "a field twice": (b'{"messages": [], "messages": []}', "the field 'messages' stands there twi"),
    "nested too deep": (b'{"messages": ' + b"[" * 200_000, "nested too deep"),
    "role unknown": (chat(("user", "a"), ("wizard", "b"), ("assistant", "c")), "the role 'wizard'"),
    "no role": (b'{"messages": [{"content": "a"}]}', r"messages\[0\] is no object with a role"),
    "empty conversation": (b'{"messages": []}', "messages must be a list of objects"),
    "no assistant": (chat(("user", "a")), "no assistant turn to learn from"),
    "a picture": (chat(("user", [{"type": "image"}]), ("assistant", "b")), "part of type image"),
    "content is a number": (chat(("user", 3), ("assistant", "b")), "content is a int"),
    "assistant first": (chat(("assistant", "a"), ("user", "b")), "roles must alternate"),
    "half a character": (chat(("user", "\ud800"), ("assistant", "b")), "is half a character"),
    "a digit too many": (b'{"messages": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
}


def examples_of(file, on_error):
    records = read_records(str(file), kind="chat", on_error=on_error)
    return list(encode(records, tokenizer_of("gemma"), on_error=on_error))


@pytest.mark.parametrize("name", LINES)
def test_a_malformed_line_is_named_and_ends_nothing_unless_told_to(tmp_path, caplog, name):
    line, message = LINES[name]
    file = tmp_path / "d.jsonl"
    file.write_bytes(LINE + b"\n" + line + b"\n" + LINE + b"\n")
    with caplog.at_level(logging.WARNING, "peft_jax"):
        assert len(examples_of(file, "skip")) == 2
    assert f"{file}:2: " in caplog.text
    with pytest.raises(MalformedRecordError, match=message) as caught:
        examples_of(file, "stop")
    assert str(caught.value).startswith(f"{file}:2: ")


def test_a_line_of_five_megabytes_is_a_line(tmp_path):
    file = tmp_path / "d.jsonl"
    long = chat(("user", "a" * 5_000_000), ("assistant", "b"))
    file.write_bytes(LINE + b"\n" + long + b"\n" + LINE)
    records = read_records(str(file), kind="chat", on_error="stop")
    assert [len(r.value["messages"][0]["content"]) for r in records] == [1, 5_000_000, 1]


def test_line_ends_and_marks_of_other_systems(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + LINE + b"\r\n\r\n" + LINE + b"\r" + LINE)
    records = read_records(str(file), kind="chat", on_error="stop")
    assert [r.origin.rpartition(":")[2] for r in records] == ["1", "3", "4"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "a.jsonl:1: the file is in UTF-16"),
        ("a.jsonl.gz", gzip.compress(LINE * 100, mtime=0)[:40], "not whole gzip data"),
        ("a.jsonl.gz", LINE, r"a.jsonl.gz:1: not whole gzip data"),
        ("a.csv", b"prompt,prompt,completion\na,b,c\n", "a.csv:1: the column 'prompt' stands"),
        ("a.json", b'[{"text": "\xe9"}]', "a.json:1: not UTF-8"),
        ("a.txt", b"one\ntwo \xff\n", "a.txt:2: not UTF-8"),
        ("a.parquet", b"PAR1 and no more", "a.parquet is not a whole parquet file"),
        ("a.arrow", b"nothing", "a.arrow is not a whole arrow file"),
    ],
)
def test_files_that_cannot_be_read_at_all(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_records(str(tmp_path / name), kind="completion")


def test_rows_of_a_csv(tmp_path, caplog):
    file = tmp_path / "d.csv"
    file.write_bytes(b'prompt,completion\na,b\nc,\xe9\nd\n\ne,f\n"g\nh",i\n')
    with caplog.at_level(logging.WARNING, "peft_jax"):
        records = read_records(str(file), kind="completion")
    assert [r.value["prompt"] for r in records] == ["a", "e", "g\nh"]
    assert "d.csv:3: not UTF-8" in caplog.text
    assert "d.csv:4: not 2 columns" in caplog.text


def test_when_nothing_is_left_the_reasons_are_counted(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_bytes(b"{\n" * 3 + b'{"messages": []}\n' * 1200 + b"[]\n")
    with pytest.raises(ValueError, match=r"no usable chat record \(1204 malformed\)") as caught:
        read_records(str(file), kind="chat")
    table = str(caught.value).splitlines()[2:]
    assert len(table) == 3
    assert [int(row.split()[0].replace(",", "")) for row in table] == [1200, 3, 1]
    assert f"{file}:1: not valid JSON" in table[1]
