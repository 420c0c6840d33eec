"""The chat templates that trl ships, conversations of each kind, and what trl's training variants
of the templates teach of them.
"""

import copy
import functools
import importlib.util
import json
import re
from pathlib import Path

import numpy as np

import peft_jax
from peft_jax.data.chat import _EMPTY, _encoded, _message, encode_chat
from peft_jax.data.chat import Row as Text
from peft_jax.data.templates import REASONING, Template, render, template_of
from peft_jax.hub.checkpoint import BASE

TOKENS = re.compile(
    r"<\|[\w▁/\"]+\|?>|<[\w▁]+\|>|<｜[^｜'+]+｜>|</s>|\[/?INST\]|\[gMASK\]|<sop>"
    r"|</?(?:think|tool_call|tool_response|start_of_turn|end_of_turn|end_of_utterance)>"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "City"}},
            "required": ["city"],
        },
    },
}
CALLS = [
    {
        "id": "call00001",
        "type": "function",
        "function": {"name": "weather", "arguments": {"city": "Oslo"}},
    }
]
RAIN = {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "rain"}
TWO = [user("What is two and two?"), assistant("It is four.")]
THREE = [user("And three?"), assistant("Then seven.")]
CASES = {
    "one turn": (TWO, None),
    "two turns": ([*TWO, *THREE], None),
    "with system": ([{"role": "system", "content": "Be brief."}, *TWO], None),
    "reasoning in each turn": (
        [
            TWO[0],
            assistant("It is four.", reasoning_content="I count."),
            THREE[0],
            assistant("Then seven.", reasoning_content="I add."),
        ],
        None,
    ),
    "tools and tool calls": (
        [user("Is it raining?"), assistant("", tool_calls=CALLS), RAIN, assistant("It rains.")],
        [WEATHER],
    ),
    "null content": (
        [user("Is it raining?"), assistant(None, tool_calls=CALLS), RAIN, assistant("It rains.")],
        [WEATHER],
    ),
}


@functools.cache
def folder():
    found = importlib.util.find_spec("trl")  # without importing it
    return Path(found.submodule_search_locations[0]) / "chat_templates"


def names():
    return sorted(p.stem for p in folder().glob("*.jinja") if not p.stem.endswith("_training"))


@functools.cache
def tokenizer_of(name):
    """The built-in base's tokenizer with a template and the special tokens that it writes."""
    source = (folder() / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = copy.deepcopy(peft_jax.load_tokenizer(BASE))
    special = sorted(set(TOKENS.findall(source)))
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = source
    return tokenizer


def joined(lists):
    return [x for part in lists for x in part]


def variant_of(name):
    """trl's training variant: of its own, or the template itself where it marks what is
    generated; None where there is none.
    """
    file = folder() / f"{name}_training.jinja"
    template = template_of(tokenizer_of(name))
    if file.exists():
        return template._replace(source=file.read_text(encoding="utf-8"))
    return template if template.marked else None


def taught_by(tokenizer, variant: Template, messages, tools, turn):
    """The ids that a variant's mask teaches of one turn at the end of a conversation, without an
    empty block of reasoning.
    """
    whole = render(variant, messages[: turn + 1], tools)
    known = len(render(variant, messages[:turn], tools).generated) if turn else 0
    return _ids(tokenizer, whole.text, whole.generated[known:])


def _ids(tokenizer, text, spans):
    kept = []
    for a, b in spans:
        empty = _EMPTY.match(text, a, b)
        kept.append((a if empty is None else empty.end(), b))
    ids, learnt = _encoded(tokenizer, Text(text, kept))
    return ids[learnt].tolist()


def verdict(name, case):
    """What is learnt of a conversation, against the training variant's mask: a word, and an
    explanation where they are not equal.
    """
    messages, tools = CASES[case]
    tokenizer = tokenizer_of(name)
    template = template_of(tokenizer)
    try:
        rows = encode_chat(tokenizer, messages, tools)
    except ValueError as error:
        return "refused", str(error).partition(": ")[2]
    ours = [ids[learnt].tolist() for ids, learnt in rows]
    if any(m.get("tool_calls") for m in messages) and template.form.call is None:
        return ("calls left out", "") if _plain(tokenizer, ours, ["It rains."]) else ("wrong", ours)
    variant = variant_of(name)
    if variant is None:
        return _as_said(tokenizer, template, messages, ours)
    said = [_message(m, template, 0) for m in messages]
    own = [i for i, m in enumerate(said) if m["role"] == "assistant"]
    if variant.source != template.source and template.form.call == ("", str):
        said = [_with_objects(m) for m in said]  # this variant writes arguments as JSON itself
    try:
        each = [taught_by(tokenizer, variant, said, tools, i) for i in own]
        whole = render(variant, said, tools)
    except Exception as error:
        return "variant refuses", str(error)
    learnt = joined(ours)
    if learnt in (joined(each), _ids(tokenizer, whole.text, whole.generated)):
        return "equal", f"{len(rows)} rows" if len(rows) > 1 else ""
    return "other", (tokenizer.decode(learnt), tokenizer.decode(joined(each)))


def _with_objects(message):
    calls = [
        {
            **c,
            "function": {
                **c["function"],
                "arguments": json.loads(c["function"]["arguments"]),
            },
        }
        for c in message.get("tool_calls", [])
    ]
    return {**message, "tool_calls": calls} if calls else message


def _as_said(tokenizer, template, messages, ours):
    """Whether what is learnt is the assistant's turns and the tokens that end them."""
    said = []
    for message in messages:
        if message["role"] != "assistant":
            continue
        thought = next((message[n] for n in REASONING if message.get(n)), "")
        said.append((thought, message.get("content") or "", message.get("tool_calls")))
    text = tokenizer.decode(joined(ours))
    at = 0
    for _, content, calls in said:
        wanted = [content] if content else [calls[0]["function"]["name"], "Oslo"]
        for piece in wanted:
            at = text.find(piece, at)
            if at < 0:
                return "wrong", text
            at += len(piece)
    special = set(tokenizer.all_special_ids)
    ended = all(special & set(ids[-2:]) for ids in ours)
    strangers = [
        w for w in ("What is two", "And three", "raining", "rain\n", "Be brief") if w in text
    ]
    return ("turns", "") if ended and not strangers else ("wrong", text)


def _plain(tokenizer, ours, contents):
    """Whether the learnt text is these contents, each with special tokens after it."""
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in ours]
    return texts == contents and all(
        np.isin(ids[-2:], tokenizer.all_special_ids).any() for ids in ours
    )
