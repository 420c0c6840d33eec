"""The formats that data comes in, told from the fields of a record, and what each makes of it.

messages and ShareGPT are conversations; Alpaca, question and answer, prompt and completion may be
read as completions or, where `kind` is chat, as conversations of two turns. Preference pairs are
recognised, and refused by who cannot learn from them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

Kind = Literal[
    "text",
    "completion",
    "chat",
    "classification",
    "tagging",
    "question_answering",
    "pairs",
    "facts",
    "preference",
]
Value = Mapping[str, Any]


class Format(NamedTuple):
    """A format: its name, the fields that tell it, the kind that its records are, and the record in
    the fields of a kind.
    """

    name: str
    fields: tuple[str, ...]
    kind: Kind
    to: Mapping[Kind, Callable[[Value], dict[str, Any]]]


def told(value: Value) -> Format | None:
    """The format that a record's fields tell; None where they tell none."""
    there = {name for name, field in value.items() if field is not None}
    return next((f for f in FORMATS if there.issuperset(f.fields)), None)


def converted(value: Value, kind: Kind) -> Value:
    """A record in the fields of a kind, where its format has them under other names."""
    found = told(value)
    make = None if found is None else found.to.get(kind)
    return value if make is None else make(value)


def _same(value: Value) -> dict[str, Any]:
    return dict(value)


def _sharegpt(value: Value) -> dict[str, Any]:
    turns = value["conversations"]
    turns = json.loads(turns) if isinstance(turns, str) else turns
    if not isinstance(turns, list) or not all(isinstance(t, Mapping) for t in turns):
        raise ValueError("'conversations' is no list of turns")
    messages = [
        {
            **{k: v for k, v in turn.items() if k not in ("from", "value")},
            "role": turn.get("from", turn.get("role")),
            "content": turn.get("value", turn.get("content")),
        }
        for turn in turns
    ]
    system = value.get("system")
    if system and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": system}, *messages]
    return {**_others(value, "conversations", "system"), "messages": messages}


def _alpaca_prompt(value: Value) -> str:
    said = f"### Instruction:\n{value['instruction']}\n\n"
    if value.get("input"):
        said += f"### Input:\n{value['input']}\n\n"
    return f"{said}### Response:\n"


def _alpaca(value: Value) -> dict[str, Any]:
    return {"prompt": _alpaca_prompt(value), "completion": value["output"]}


def _alpaca_chat(value: Value) -> dict[str, Any]:
    asked = value["instruction"]
    if value.get("input"):
        asked = f"{asked}\n\n{value['input']}"
    return _exchange(value, asked, value["output"])


def _question(value: Value) -> dict[str, Any]:
    return {"prompt": f"{value['question']}\n", "completion": value["answer"]}


def _question_chat(value: Value) -> dict[str, Any]:
    return _exchange(value, value["question"], value["answer"])


def _completion_chat(value: Value) -> dict[str, Any]:
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        answered = completion
        if not isinstance(completion, list):
            answered = [{"role": "assistant", "content": completion}]
        return {**_others(value, "prompt", "completion"), "messages": [*asked, *answered]}
    return _exchange(value, prompt.strip(), completion.strip())


def _exchange(value: Value, asked: Any, answer: Any) -> dict[str, Any]:
    """A question and its answer, after a system text where there is one."""
    if not isinstance(asked, str) or not isinstance(answer, str):
        raise ValueError("the question or its answer is no text")
    system = value.get("system") or value.get("system_prompt")
    first = [{"role": "system", "content": system}] if system else []
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"messages": [*first, *turns]}


def _others(value: Value, *names: str) -> dict[str, Any]:
    return {k: v for k, v in value.items() if k not in names}


FORMATS = (
    Format("preference", ("chosen", "rejected"), "preference", {}),
    Format("messages", ("messages",), "chat", {"chat": _same}),
    Format("ShareGPT", ("conversations",), "chat", {"chat": _sharegpt}),
    Format(
        "prompt and completion",
        ("prompt", "completion"),
        "completion",
        {"completion": _same, "chat": _completion_chat},
    ),
    Format(
        "Alpaca",
        ("instruction", "output"),
        "completion",
        {"completion": _alpaca, "chat": _alpaca_chat},
    ),
    Format("SQuAD", ("question", "context", "answers"), "question_answering", {}),
    Format(
        "question and answer",
        ("question", "answer"),
        "completion",
        {"completion": _question, "chat": _question_chat},
    ),
    Format("facts", ("subject", "relation", "object"), "facts", {}),
    Format("pairs", ("anchor", "positive"), "pairs", {}),
    Format("tagging", ("tokens", "tags"), "tagging", {}),
    Format("classification", ("text", "label"), "classification", {}),
    Format("text", ("text",), "text", {"text": _same}),
)
