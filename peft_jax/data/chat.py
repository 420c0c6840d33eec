"""Conversations as tokens, with what of them is learnt.

A model meets each of its turns at the end of a conversation: what comes before it is rendered as
a prompt, and it writes the rest up to the token that ends the turn. So a turn is found in the
rendering of the conversation that ends with it, by `{% generation %}` where the template has it,
else from where the prompt for it ends. A later rendering that begins with the same text teaches
the turn too; where the template rewrites or drops what came before (reasoning of past turns), the
turn has a row of its own. T tokens.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from peft_jax.data.spans import covers, with_offsets
from peft_jax.data.templates import (
    MARK,
    REASONING,
    Message,
    Span,
    Template,
    as_parts,
    render,
    template_of,
)

logger = logging.getLogger("peft_jax")
Turns = Literal["all", "last"]
ROLES = ("system", "developer", "user", "assistant", "tool")
_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "chatbot": "assistant",
    "bot": "assistant",
    "function": "tool",
    "observation": "tool",
}
ASSISTANT = {"assistant", *(name for name, role in _ALIASES.items() if role == "assistant")}
_OPENED = re.compile(r"(<think>|<\|channel>thought)\s*((</think>|<channel\|>)\s*)?$")
_EMPTY = re.compile(
    r"\s*(<think>\s*</think>|<\|channel>thought\s*<channel\|>"
    r"|<\|channel\|>analysis<\|message\|>\s*<\|end\|><\|start\|>assistant)\s*"
)
_INLINE = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


class Row(NamedTuple):
    """A rendering, and the characters in it that are learnt."""

    text: str
    spans: list[Span]


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
    *,
    template: str | None = None,
    turns: Turns = "all",
    **template_options: Any,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The rows of a conversation: pairs of int32 tokens [T] and, for each, whether it is learnt.

    Every assistant turn is learnt with the token that ends it, as the model will meet it: in one
    row where the template keeps earlier turns as they were, else in several. With `turns` of
    "last" there is one row, the whole conversation, in which the turns are learnt that stand there
    as they did when the model wrote them. `template` is the name of a template or a file, by
    default the tokenizer's own. Raises ValueError for what is no conversation, and for what the
    template refuses.
    """
    chosen = template_of(tokenizer, template, tools=bool(tools), options=template_options)
    return [
        _encoded(tokenizer, row) for row in chat_rows(tokenizer, chosen, messages, tools, turns)
    ]


def chat_rows(
    tokenizer: Any,
    template: Template,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
    turns: Turns = "all",
) -> list[Row]:
    """The rows of a conversation as texts. Raises ValueError as `encode_chat` does."""
    said = [_message(m, template, i) for i, m in enumerate(messages)]
    own = [i for i, m in enumerate(said) if m["role"] == "assistant"]
    if not own:
        raise ValueError("no assistant turn to learn from")
    conversation = _Conversation(template, said, _tools(tools), _special(tokenizer, len(tokenizer)))
    try:
        return list(_rows(conversation, own, turns))
    except Exception as error:  # templates raise errors of any kind
        raise _refused(error) from error


def chat_prompt(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
    **template_options: Any,
) -> list[int]:
    """The tokens that a model continues with its next turn, as `encode_chat` has them before it.
    Raises ValueError as that does.
    """
    template = template_of(tokenizer, tools=bool(tools), options=template_options)
    said = [_message(m, template, i) for i, m in enumerate(messages)]
    text = _rendered(template, said, _tools(tools))
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def answer_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """What an assistant's turn says, of the tokens that a model wrote: without special tokens, and
    without what the template writes before the content of a plain turn (gpt-oss's channel).
    """
    ids = list(ids)
    template = template_of(tokenizer)
    lead = _lead(template, _special(tokenizer, len(tokenizer)))
    if lead:
        first = tokenizer(lead, add_special_tokens=False, verbose=False)["input_ids"]
        ends = [i for i in range(len(first), len(ids) + 1) if ids[i - len(first) : i] == first]
        ids = ids[ends[-1] :] if ends else ids
    return tokenizer.decode(ids, skip_special_tokens=True)


def _lead(template: Template, special: re.Pattern[str] | None) -> str:
    """What stands between the prompt for a plain turn and its content, where tokens are in it."""
    turns = [_said(template, "user", "a"), _said(template, "assistant", MARK)]
    try:
        text = render(template, turns).text.partition(MARK)[0]
    except Exception:  # a template for other conversations
        return ""
    cue = _cue(template)
    if not cue or special is None or cue not in text:
        return ""
    lead = _EMPTY.sub("", text.rpartition(cue)[2], count=1)
    return lead if special.search(lead) else ""


def _rendered(template: Template, said: list[Message], tools: list[Any] | None) -> str:
    try:
        return render(template, said, tools, prompt=True).text
    except Exception as error:  # templates raise errors of any kind
        raise _refused(error) from error


def _refused(error: Exception) -> ValueError:
    said = str(error) or type(error).__name__
    return ValueError(f"the chat template refuses this conversation: {said}")


def content_text(message: Mapping[str, Any]) -> str:
    """The text of a message."""
    return _text(message.get("content"), "the message") or ""


def _encoded(tokenizer: Any, row: Row) -> tuple[np.ndarray, np.ndarray]:
    encoded = with_offsets(tokenizer, row.text, add_special_tokens=False)
    learnt = np.zeros(len(encoded["input_ids"]), bool)
    offsets = np.asarray(encoded["offset_mapping"]).reshape(-1, 2)
    for span in row.spans:
        learnt |= covers(offsets, span)
    return np.asarray(encoded["input_ids"], np.int32), learnt


# --------------------------------------------------------------------------------------------------
# messages in the form that a template reads


def _message(message: Any, template: Template, index: int) -> Message:
    """A message in the template's form. Raises ValueError for what is none."""
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is a {type(message).__name__}, no object with role and content")
    form = template.form
    kept = {k: v for k, v in message.items() if v is not None and k not in ("content", *REASONING)}
    kept["role"] = _role(message.get("role"), template, where)
    content = _text(message.get("content"), where)
    reasoning = next((message[n] for n in REASONING if message.get(n)), None)
    if reasoning is not None and form.inline:
        content = f"<think>\n{reasoning}\n</think>\n\n{content or ''}"
    elif reasoning is not None:
        kept |= dict.fromkeys(form.reasoning or REASONING[:1], reasoning)
    content = content or ""
    calls = kept.pop("tool_calls", None)
    if calls:
        kept["tool_calls"] = [_call(c, form.call, f"{where}.tool_calls") for c in calls]
    if calls and not content and form.call is not None:
        content = form.call[0]
    kept["content"] = as_parts(content) if form.parts and content is not None else content
    return kept


def _role(role: Any, template: Template, where: str) -> str:
    if not isinstance(role, str) or not role:
        raise ValueError(f"{where} has no role")
    known = _ALIASES.get(role, role)
    if known in ROLES or re.search(rf"(['\"]){re.escape(role)}\1", template.source):
        return known if known in ROLES else role
    raise ValueError(f"{where} has the role {role!r}, which is none of {', '.join(ROLES)}")


def _text(content: Any, where: str) -> str | None:
    """Content as text; of a list of parts the text of all."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(
            f"{where}.content is a {type(content).__name__}: expected text or a list of parts"
        )
    texts = []
    for part in content:
        text = part if isinstance(part, str) else _part(part)
        if text is None:
            kind = part.get("type", "unnamed") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"{where}.content holds a part of type {kind}: only text is learnt")
        texts.append(text)
    return "".join(texts)


def _part(part: Any) -> str | None:
    if not isinstance(part, Mapping) or part.get("type", "text") not in ("text", "input_text"):
        return None
    text = part.get("text")
    return text if isinstance(text, str) else None


def _call(call: Any, form: tuple[Any, type] | None, where: str) -> Message:
    """A tool call with its arguments as the template reads them."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} should hold objects with a function's name and arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError:
            return {"type": "function", **call, "function": dict(function)}
    if isinstance(arguments, Mapping):  # tables fill in what other records' calls have
        arguments = {k: v for k, v in arguments.items() if v is not None}
    if form is not None and form[1] is str:
        arguments = json.dumps(arguments, ensure_ascii=False)
    other = {k: v for k, v in call.items() if k not in ("name", "arguments") and v is not None}
    return {"type": "function", **other, "function": {**function, "arguments": arguments}}


def _tools(tools: Any) -> list[Any] | None:
    """Tools as a list of schemas; some tables keep them as JSON."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"tools is not valid JSON: {error.msg}") from error
    if tools is not None and not isinstance(tools, list | tuple):
        raise ValueError(f"tools is a {type(tools).__name__}: expected a list of schemas")
    return list(tools) if tools else None


# --------------------------------------------------------------------------------------------------
# turns and rows


class _Conversation(NamedTuple):
    """Messages in the template's form, with what finds turns in their rendering."""

    template: Template
    messages: list[Message]
    tools: list[Any] | None
    special: re.Pattern[str] | None

    def before(self, i: int) -> str | None:
        """What the model sees before it writes message i; None where the template renders none."""
        if i == 0:
            return None
        try:
            return render(self.template, self.messages[:i], self.tools, prompt=True).text
        except Exception:  # a template may take no prompt here: the turn is found otherwise
            return None

    def marked(self, i: int) -> str:
        """The conversation that ends with message i, whose content is the mark."""
        turn = _said(self.template, self.messages[i]["role"], MARK)
        turn |= {n: MARK for n in REASONING if n in self.messages[i]}
        return render(self.template, [*self.messages[:i], turn], self.tools).text


def _rows(conversation: _Conversation, own: list[int], turns: Turns) -> Iterator[Row]:
    """The rows of a conversation's own turns, the shortest first."""
    rows: list[Row] = []
    for i in reversed(own):
        text, spans = _turn(conversation, i)
        if not spans:
            continue
        for row in rows:
            end = _shared(text, row.text, conversation.special)
            if end is not None:
                row.spans[:0] = [(a, min(b, end)) for a, b in spans if a < end]
                break
        else:
            if turns == "all" or not rows:
                rows.append(Row(text, spans))
    yield from reversed(rows)


def _turn(conversation: _Conversation, i: int) -> Row:
    """The conversation up to message i, and what of that message is learnt."""
    template, message = conversation.template, conversation.messages[i]
    whole = render(template, conversation.messages[: i + 1], conversation.tools)
    text = whole.text
    if template.marked:
        known = 0
        if i:
            known = len(render(template, conversation.messages[:i], conversation.tools).generated)
        return Row(text, _taught(text, whole.generated[known:]))
    before = conversation.before(i)
    start = _start(conversation, i, text, before)
    text = _with_reasoning(text, start, before, message)
    taught = template.taught_header.search(text, 0, start)
    start = start if taught is None else taught.start()
    _tell_of_reasoning(template, message, text[start:])
    text += _missing_end(template, message, conversation.special)
    if message.get("tool_calls") and not _says_calls(text[start:], message):
        _tell(template.source, "tool calls, so turns that make some are not learnt")
        return Row(text, [])
    return Row(text, _taught(text, [(start, len(text.rstrip(" ")))]))


def _start(conversation: _Conversation, i: int, text: str, before: str | None) -> int:
    """Where in the rendering that ends with message i the model begins to write it: after the
    prompt, but for the reasoning that the prompt opens; where the rendering does not go on from the
    prompt, where its content begins.
    """
    header = None if before is None else _OPENED.sub("", before)
    if header is None or not text.startswith(header):
        header = _common(text, conversation.marked(i))
    cue = _cue(conversation.template)
    if cue and text.startswith(cue, len(header)):
        header += cue
    return len(header)


def _common(a: str, b: str) -> str:
    """What both texts begin with."""
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    return a[: min(len(a), len(b)) if length is None else length]


def _taught(text: str, spans: Sequence[Span]) -> list[Span]:
    """Spans without the empty block of reasoning that one may begin with."""
    found = []
    for a, b in spans:
        empty = _EMPTY.match(text, a, b)
        start = a if empty is None else empty.end()
        if start < b:
            found.append((start, b))
    return found


def _with_reasoning(text: str, start: int, before: str | None, message: Message) -> str:
    """The text, with the reasoning that the template drops though its prompt asks for it."""
    content = message["content"]
    inline = _INLINE.match(content) if isinstance(content, str) else None
    opened = None if before is None else _OPENED.search(before)
    if inline is None or opened is None or opened[2] or _INLINE.match(text, start):
        return text
    thought = inline[1].strip()
    return f"{before}{thought}\n</think>\n\n{text[start:].lstrip()}" if thought else text


def _says_calls(text: str, message: Message) -> bool:
    return all(c["function"]["name"] in text for c in message["tool_calls"])


@functools.lru_cache(maxsize=8)
def _special(tokenizer: Any, size: int) -> re.Pattern[str] | None:
    """The tokens that stand for themselves in a text, of a tokenizer of `size` tokens."""
    added = {str(t.content) for t in tokenizer.added_tokens_decoder.values()}
    added |= set(tokenizer.all_special_tokens)
    names = sorted(filter(None, added), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))) if names else None


def _tail(text: str, special: re.Pattern[str] | None) -> list[int]:
    """Where each special token ends that a text ends with, the last one first."""
    ends: list[int] = []
    if special is None:
        return ends
    found = list(special.finditer(text))
    end = len(text)
    for token in reversed(found):
        if text[token.end() : end].strip():
            break
        ends.append(token.end())
        end = token.start()
    return ends


def _shared(text: str, later: str, special: re.Pattern[str] | None) -> int | None:
    """How far a later rendering holds a turn: the whole of it, or all but tokens that stand only at
    the end of a conversation. None where it does not hold it with a token that ends it.
    """
    if later.startswith(text):
        return len(text)
    for end in _tail(text, special):
        if later.startswith(text[:end]):
            blank = len(text) - len(text[end:].lstrip()) if text[end:] else end
            return blank if later.startswith(text[:blank]) else end
    return None


@functools.lru_cache(maxsize=256)
def _tell(source: str, what: str) -> None:
    """Say once for each template what it leaves out."""
    logger.warning("the chat template renders no %s", what)


def _tell_of_reasoning(template: Template, message: Message, turn: str) -> None:
    thought = next((message[n] for n in REASONING if message.get(n)), None)
    if isinstance(thought, str) and thought.strip() not in turn:
        _tell(template.source, "reasoning of some turns, so it is not learnt there")


def _missing_end(template: Template, message: Message, special: re.Pattern[str] | None) -> str:
    """The token that ends a turn where the template writes none: the one that begins the next."""
    if special is None:
        return ""
    names = json.dumps(dict(template.special), sort_keys=True)
    return _ending(template.source, names, bool(message.get("tool_calls")), special)


@functools.lru_cache(maxsize=64)
def _ending(source: str, names: str, called: bool, special: re.Pattern[str]) -> str:
    template = Template(source, json.loads(names), {})
    turns = [_said(template, "user", "a"), _said(template, "assistant", MARK)]
    try:
        first = render(template, turns).text
        after = [*turns, _said(template, "tool" if called else "user", "a")]
        second = render(template, after).text
    except Exception:  # a template that takes no such turn says nothing of how it begins
        return ""
    if special.search(first.partition(MARK)[2]) or not second.startswith(first):
        return ""
    begins = special.match(second[len(first) :])
    return begins.group() if begins else ""


def _cue(template: Template) -> str:
    """What the template writes to prompt a turn after a user's, without reasoning."""
    return _cue_of(template.source, json.dumps(dict(template.special), sort_keys=True))


@functools.lru_cache(maxsize=64)
def _cue_of(source: str, names: str) -> str:
    template = Template(source, json.loads(names), {})
    asked = [_said(template, "user", "a")]
    try:
        plain, prompt = (render(template, asked, prompt=p).text for p in (False, True))
    except Exception:  # a template without a prompt has no cue
        return ""
    return _OPENED.sub("", prompt.removeprefix(plain)) if prompt.startswith(plain) else ""


def _said(template: Template, role: str, content: str) -> Message:
    return {"role": role, "content": as_parts(content) if template.form.parts else content}
