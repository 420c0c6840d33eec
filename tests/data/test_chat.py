"""Conversations: every template that trl ships against its training variants, families that it
does not ship, and what messages may hold.
"""

import copy
import logging

import numpy as np
import pytest

import peft_jax
from peft_jax.data import Record, encode, encode_chat
from peft_jax.data.chat import answer_of
from peft_jax.data.encode import ChatOptions
from peft_jax.data.templates import template_of
from peft_jax.hub.checkpoint import BASE
from tests.data.trl_templates import (
    CALLS,
    CASES,
    THREE,
    TWO,
    WEATHER,
    assistant,
    names,
    tokenizer_of,
    user,
    verdict,
)

PHI_4 = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}"
    "{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


# Where what is learnt is not what the training variant teaches, and why that is so.
OTHERWISE = {
    # the variant drops the reasoning that the template's own prompt opens
    ("deepseekv3", "reasoning in each turn"),
    # the token at which the model stops for the tool's answer is learnt
    ("diffusion_gemma", "tools and tool calls"),
    ("diffusion_gemma", "null content"),
}


@pytest.mark.parametrize("name", names())
def test_what_every_template_teaches(name):
    """The training variant's mask token for token; where there is none, the assistant's turns with
    their end; refused only what the template refuses itself.
    """
    for case in CASES:
        word, said = verdict(name, case)
        wanted = {"equal", "turns", "calls left out", "refused"}
        assert word in wanted or (word == "other" and (name, case) in OTHERWISE), (case, word, said)
        if word == "refused":
            assert any(s in said for s in ("roles must alternate", "not supported", "Only user"))


def text_of(tokenizer, pair):
    ids, learnt = pair
    return tokenizer.decode(ids[learnt])


@pytest.fixture(scope="module")
def plain():
    """A tokenizer with the special tokens of Phi-4 and of Mistral."""
    tokenizer = copy.deepcopy(peft_jax.load_tokenizer(BASE))
    special = ["<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|endoftext|>", "[INST]", "[/INST]"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (PHI_4, "It is four.<|im_end|>Then seven.<|im_end|><|endoftext|>"),
        (MISTRAL, " It is four.</s> Then seven.</s>"),
    ],
    ids=["phi4", "mistral"],
)
def test_families_without_a_training_variant(plain, source, wanted):
    plain.chat_template = source
    (row,) = encode_chat(plain, [*TWO, *THREE])
    assert text_of(plain, row) == wanted


def test_a_conversation_is_as_many_rows_as_the_template_rewrites_it():
    """Qwen3 writes no empty reasoning into turns that are past, but does into the last."""
    tokenizer = tokenizer_of("qwen3")
    rows = encode_chat(tokenizer, [*TWO, *THREE])
    assert [text_of(tokenizer, r) for r in rows] == [
        "It is four.<|im_end|>\n",
        "Then seven.<|im_end|>\n",
    ]
    for (ids, _), upto in zip(rows, (2, 4), strict=True):  # as the model meets each
        seen = tokenizer.apply_chat_template([*TWO, *THREE][:upto], tokenize=False)
        assert tokenizer.decode(ids) == seen
    (last,) = encode_chat(tokenizer, [*TWO, *THREE], turns="last")
    assert text_of(tokenizer, last) == "Then seven.<|im_end|>\n"
    (row,) = encode_chat(tokenizer_of("llama3"), [*TWO, *THREE], turns="last")
    assert text_of(tokenizer_of("llama3"), row) == "It is four.<|eot_id|>Then seven.<|eot_id|>"


def test_reasoning_is_learnt_and_an_empty_block_of_it_is_not():
    tokenizer = tokenizer_of("qwen3")
    thought = [TWO[0], assistant("Four.", reasoning_content="I count.")]
    (row,) = encode_chat(tokenizer, thought)
    assert text_of(tokenizer, row) == "<think>\nI count.\n</think>\n\nFour.<|im_end|>\n"
    (row,) = encode_chat(tokenizer, [TWO[0], assistant("Four.")])
    assert "<think>" in tokenizer.decode(row[0])
    assert text_of(tokenizer, row) == "Four.<|im_end|>\n"
    (row,) = encode_chat(tokenizer, [TWO[0], assistant("Four.")], enable_thinking=False)
    assert text_of(tokenizer, row) == "Four.<|im_end|>\n"
    distilled = tokenizer_of("deepseek_r1_distill")  # its prompt opens the block
    (row,) = encode_chat(distilled, thought)
    asked = distilled.apply_chat_template(thought[:1], tokenize=False, add_generation_prompt=True)
    assert distilled.decode(row[0]) == f"{asked}I count.\n</think>\n\nFour.<｜end▁of▁sentence｜>"


@pytest.mark.parametrize("name", ["gptoss", "muse_glimmer", "qwen3", "gemma4_v5", "llama3"])
def test_an_answer_is_what_the_turn_says(name):
    """Of channels and recipients in special tokens and words, nothing is left."""
    tokenizer = tokenizer_of(name)
    ((ids, learnt),) = encode_chat(tokenizer, TWO)
    assert answer_of(tokenizer, ids[learnt]).strip() == "It is four."
    plain = tokenizer("It is four.", add_special_tokens=False)["input_ids"]
    assert answer_of(tokenizer, plain) == "It is four."


def test_padding_that_is_the_end_token_hides_nothing(plain):
    tokenizer = copy.deepcopy(plain)
    tokenizer.chat_template, tokenizer.pad_token = MISTRAL, "</s>"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (row,) = encode_chat(tokenizer, TWO)
    assert text_of(tokenizer, row).endswith("</s>")


def test_what_messages_may_hold():
    tokenizer = tokenizer_of("qwen3_instruct_2507")
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "four."}]
    other = [user([{"type": "text", "text": TWO[0]["content"]}]), assistant(parts, name=None)]
    named = [{"role": "human", "content": TWO[0]["content"]}, {"role": "gpt", **_content(TWO[1])}]
    for messages in (other, named):
        for ours, theirs in zip(
            encode_chat(tokenizer, messages), encode_chat(tokenizer, TWO), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
    call = [{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]
    said = [user("Weather?"), assistant(None, tool_calls=call)]
    objects = [user("Weather?"), assistant("", tool_calls=CALLS)]
    ours, theirs = (encode_chat(tokenizer, m, [WEATHER])[0] for m in (said, objects))
    assert text_of(tokenizer, ours) == text_of(tokenizer, theirs)
    assert '{"name": "weather", "arguments": {"city": "Oslo"}}' in text_of(tokenizer, ours)


def _content(message):
    return {"content": message["content"]}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no assistant turn"),
        ([user("a")], "no assistant turn"),
        ([user("a"), {"role": "wizard", "content": "b"}], r"messages\[1\] has the role 'wizard'"),
        ([user([{"type": "image"}]), assistant("b")], "a part of type image: only text is learnt"),
        ([user(3), assistant("b")], r"messages\[0\].content is a int"),
        (["a", assistant("b")], r"messages\[0\] is a str"),
        ([user("a"), assistant("", tool_calls=[{"x": 1}])], "a function's name and arguments"),
    ],
)
def test_what_is_no_conversation_is_said(messages, message):
    with pytest.raises(ValueError, match=message):
        encode_chat(tokenizer_of("qwen3"), messages)


def test_a_templates_own_error_is_the_records(caplog):
    tokenizer = tokenizer_of("gemma")
    system = [{"role": "system", "content": "Be brief."}, *TWO]
    records = [Record({"messages": m}, f"c.jsonl:{i}") for i, m in enumerate((TWO, system), 1)]
    assert len(list(encode(records, tokenizer, "chat"))) == 1
    assert "c.jsonl:2: the chat template refuses this conversation: System role" in caplog.text
    bad = copy.deepcopy(tokenizer)
    bad.chat_template = "{{ messages[0]['content'] + 1 }}"
    with pytest.raises(ValueError, match=r"c.jsonl:1: the chat template refuses"):
        list(encode(records, bad, "chat", on_error="stop"))


def test_records_have_tools_and_variables_of_their_own():
    tokenizer = tokenizer_of("qwen3")
    value = {"messages": TWO, "tools": [WEATHER]}
    (example,) = encode([Record(value, "x:1")], tokenizer)
    assert "# Tools" in tokenizer.decode(example.ids)
    assert example.origin == "x:1"
    tokenizer = copy.deepcopy(tokenizer_of("gemma"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{{ mood }}{{ tone }}</s>{% endfor %}"
    )
    options = ChatOptions({"mood": "happy", "tone": "high"})
    (example,) = encode(
        [Record({"messages": TWO, "chat_template_kwargs": {"mood": "sad"}}, "x:1")],
        tokenizer,
        chat=options,
    )
    assert tokenizer.decode(example.ids[example.learn]) == "It is four.sadhigh</s>"


def test_templates_by_name_and_by_file(plain, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(PHI_4)
    assert template_of(plain, str(file)).source == PHI_4
    (row,) = encode_chat(plain, TWO, template="chatml")
    assert text_of(plain, row) == "It is four.<|im_end|>\n"
    with pytest.raises(ValueError, match="is neither a file nor a template"):
        template_of(plain, "nobody")


def test_it_is_said_what_a_template_leaves_out(caplog):
    with caplog.at_level(logging.WARNING, "peft_jax"):
        tokenizer = copy.deepcopy(tokenizer_of("llama3"))
        tokenizer.chat_template += "{# of this test #}"
        thought = [TWO[0], assistant("Four.", reasoning_content="I count.")]
        (row,) = encode_chat(tokenizer, thought)
        called = [user("Weather?"), assistant("", tool_calls=CALLS), *THREE]
        (row,) = encode_chat(tokenizer, called)
    assert text_of(tokenizer, row) == "Then seven.<|eot_id|>"
    assert "renders no reasoning" in caplog.text
    assert "renders no tool calls" in caplog.text
