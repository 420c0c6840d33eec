"""Chat templates: which one is used, the form of message that it reads, and what it renders.

Templates differ in what they take: content as text or as a list of parts, arguments of tool calls
as objects or as JSON, the content beside a tool call as nothing or as empty text. What one takes
is found out by rendering a short conversation in each form, once for each template.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

Message = dict[str, Any]
Span = tuple[int, int]
MARK = "\ue000mark\ue001"  # private characters: no template and no text holds them
REASONING = ("reasoning_content", "thinking", "reasoning")


# The end of a prompt that a family's published training templates teach with the turn.
_TAUGHT_HEADERS = {
    "<｜Assistant｜>": r"(<｜Assistant｜>|<｜tool▁outputs▁end｜>)$",  # DeepSeek
    "<|start|>": r"<\|start\|>assistant$",  # gpt-oss, where the model also writes it itself
    "'<|im_start|>' + message.role }}": r"(?<=<\|im_start\|>assistant)\n$",  # Qwen2.5
}
_NOTHING = re.compile(r"(?!)")


class Template(NamedTuple):
    """A template's source, the special tokens that it may name, and the variables given to it."""

    source: str
    special: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def marked(self) -> bool:
        """Whether the template says itself what the assistant generates."""
        return _marked(self.source)

    @property
    def taught_header(self) -> re.Pattern[str]:
        """What of the end of a prompt is learnt with the turn; mostly nothing."""
        return _taught_header(self.source)

    @property
    def form(self) -> Form:
        """The form of message that the template reads."""
        return _form(self.source)


class Form(NamedTuple):
    """Whether content is a list of parts; the content and the arguments of a tool call (None where
    the template renders none); the names of the field that reasoning is read from.
    """

    parts: bool
    call: tuple[Any, type] | None
    reasoning: tuple[str, ...]
    inline: bool  # reasoning is read from the content, in <think> tags


class Rendered(NamedTuple):
    """A text, and the characters in it that the template says the assistant generates."""

    text: str
    generated: list[Span]


def template_of(
    tokenizer: Any,
    name: str | None = None,
    *,
    tools: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Template:
    """The tokenizer's template; or that of a name among its own, of a name among the package's, or
    of a file. Raises ValueError where there is none.
    """
    source = _source(tokenizer, name, tools)
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    return Template(source, special, dict(options or {}))


def _source(tokenizer: Any, name: str | None, tools: bool) -> str:
    own = tokenizer.chat_template
    named = own if isinstance(own, Mapping) else {} if own is None else {"default": own}
    if name is None:
        if not named:
            raise ValueError(
                "the tokenizer has no chat template: set data.template to chatml or to a file, use "
                "kind: completion, or a model with a template"
            )
        fallback = named.get("default", next(iter(named.values())))
        return named.get("tool_use", fallback) if tools else fallback
    if name in named:
        return named[name]
    if (file := Path(name).expanduser()).is_file():
        return file.read_text(encoding="utf-8")
    packaged = resources.files("peft_jax") / "assets" / "templates"
    known = sorted(f.name.removesuffix(".jinja") for f in packaged.iterdir())
    if name in known:
        return (packaged / f"{name}.jinja").read_text(encoding="utf-8")
    raise ValueError(
        f"option 'data.template': {name!r} is neither a file nor a template; there are "
        f"{', '.join([*named, *known])}"
    )


def render(
    template: Template,
    messages: Sequence[Message],
    tools: Sequence[Any] | None = None,
    *,
    prompt: bool = False,
) -> Rendered:
    """The text of messages, which have the template's form; with a `prompt` for the next turn."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, generated = render_jinja_template(
        conversations=[list(messages)],
        tools=list(tools) if tools else None,
        chat_template=template.source,
        return_assistant_tokens_mask=template.marked,
        add_generation_prompt=prompt,
        **{**template.special, **template.options},
    )
    spans: Any = generated[0] if template.marked else []
    return Rendered(texts[0], list(spans))


@functools.lru_cache(maxsize=64)
def _marked(source: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None


@functools.lru_cache(maxsize=64)
def _taught_header(source: str) -> re.Pattern[str]:
    found = (p for marker, p in _TAUGHT_HEADERS.items() if marker in source)
    pattern = next(found, None)
    return _NOTHING if pattern is None else re.compile(pattern)


# --------------------------------------------------------------------------------------------------
# the form of message that a template reads


@functools.lru_cache(maxsize=64)
def _form(source: str) -> Form:
    template = Template(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source), {}, {})
    names = tuple(n for n in REASONING if re.search(rf"\b{n}\b", source))
    parts = not _renders(template, _asked(False)) and _renders(template, _asked(True))
    calls = ((content, kind) for kind in (dict, str) for content in ("", None))
    call = next((c for c in calls if _renders(template, _called(c, parts))), None)
    inline = not names and "</think>" in source
    return Form(parts, call, names, inline)


def _asked(parts: bool) -> list[Message]:
    return [{"role": "user", "content": as_parts(MARK) if parts else MARK}]


def _called(call: tuple[Any, type], parts: bool) -> list[Message]:
    content, kind = call
    arguments = {"name": "value"}
    function = {"name": MARK, "arguments": arguments if kind is dict else json.dumps(arguments)}
    calls = [{"type": "function", "id": "call00000", "function": function}]
    asked = [{"role": "user", "content": as_parts("a") if parts else "a"}]
    if parts and content is not None:
        content = as_parts(content)
    return [*asked, {"role": "assistant", "content": content, "tool_calls": calls}]


def as_parts(text: str) -> list[dict[str, str]]:
    """Text as the list of parts that templates of multimodal models read."""
    return [{"type": "text", "text": text}]


def _renders(template: Template, messages: list[Message]) -> bool:
    """Whether the template renders these messages and does not leave out the mark."""
    special = {"bos_token": "", "eos_token": "", "pad_token": "", "unk_token": ""}
    try:
        text = render(template._replace(special=special), messages).text
    except Exception:  # whatever a template raises means that it does not take this form
        return False
    return MARK in text
