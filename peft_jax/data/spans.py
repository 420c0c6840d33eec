"""Where something stands in a text, in characters and in tokens: templates filled once, names as
whole words, and the tokens of a span of characters.

What is put into a text is known by its place from then on and never searched for. Only names in
free text are looked for, as whole words: runs of letters, digits, underscores and the marks upon
them, in any script. Chinese characters, hiragana, Thai, Lao, Khmer and Burmese stand without blanks
between words: there each character is a word of its own, so a name may be found inside of a longer
one that is not a name itself. T tokens.
"""

from __future__ import annotations

import codecs
import collections
import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

Span = tuple[int, int]  # the first character, and the one after the last

BREAK = "\0"  # stands for special tokens and between segments: no name reaches over it
UNKNOWN = "\ufffd"  # stands for what a tokenizer cannot say: part of a word, and of no name
_NO_BLANKS = (  # scripts that write no blanks between words
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u309f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)


def fill(template: str, subject: str) -> tuple[str, Span]:
    """The template with `subject` in the place of {}, and where it stands. Raises ValueError unless
    {} is there once.
    """
    count = template.count("{}")
    if count == 0:
        raise ValueError(f"the prompt {template!r} has no {{}} for its subject")
    if count > 1:
        raise ValueError(
            f"the prompt {template!r} has {{}} {count} times: write the subject out where it "
            "stands again"
        )
    before, after = template.split("{}")
    return f"{before}{subject}{after}", (len(before), len(before) + len(subject))


# --------------------------------------------------------------------------------------------------
# spans and tokens


def with_offsets(tokenizer: Any, *texts: Any, **options: Any) -> Any:
    """What the tokenizer makes of texts, with the characters of each token (`offset_mapping`).

    Raises ValueError for a tokenizer without them, which only those written in Rust have.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets, which finding places in "
            "texts needs: "
            "bring a tokenizer.json"
        )
    return tokenizer(*texts, return_offsets_mapping=True, verbose=False, **options)


def covers(offsets: Any, span: Span) -> np.ndarray:
    """[..., T] which tokens, of the characters `offsets` [..., T, 2], stand for some of the
    span.
    """
    first, end = np.moveaxis(np.asarray(offsets), -1, 0)
    start, stop = span
    return (first < stop) & (end > start) & (end > first)


def tokens_of(text: str, offsets: Any, span: Span) -> Span:
    """(the first token, the one after the last) of a span of the text's characters; blanks at its
    ends are no part of it.

    A character that takes several tokens has them all. Raises ValueError where no token stands for
    the span.
    """
    inside = np.flatnonzero(covers(offsets, trimmed(text, span)))
    if not len(inside):
        raise ValueError(f"no token stands for {text[span[0] : span[1]]!r} in {text!r}")
    return int(inside[0]), int(inside[-1]) + 1


def trimmed(text: str, span: Span) -> Span:
    """A span without the blanks at its ends."""
    said = text[span[0] : span[1]]
    return span[0] + len(said) - len(said.lstrip()), span[0] + len(said.rstrip())


# --------------------------------------------------------------------------------------------------
# the text of tokens


@functools.lru_cache(maxsize=1)
def bytes_of_characters() -> dict[str, int]:
    """The character that stands for each byte in byte-level tokenizers (Radford et al. 2019),
    inverted.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def token_bytes(tokenizer: Any) -> list[bytes]:
    """What each token adds to a text, in UTF-8: of byte-level vocabularies, SentencePiece's and
    WordPiece's.

    Special tokens are a BREAK, the unknown one is UNKNOWN. Raises ValueError as `with_offsets`
    does.
    """
    if not getattr(tokenizer, "is_fast", False):
        with_offsets(tokenizer, "")
    model = tokenizer.backend_tokenizer.model
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    if type(model).__name__ in ("WordPiece", "WordLevel"):
        goes_on = getattr(model, "continuing_subword_prefix", None) or ""

        def of(piece: str) -> bytes:
            inside = bool(goes_on) and piece.startswith(goes_on)
            return (piece.removeprefix(goes_on) if inside else f" {piece}").encode()
    elif any(p.startswith("Ġ") for p in pieces):
        known = bytes_of_characters()

        def of(piece: str) -> bytes:
            if not all(c in known for c in piece):
                return piece.encode()
            return bytes(known[c] for c in piece)
    else:
        of = _of_sentencepiece
    made = [of(p) for p in pieces]
    for i in set(tokenizer.all_special_ids) & set(range(len(made))):
        made[i] = BREAK.encode()
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id != tokenizer.eos_token_id:
        made[tokenizer.unk_token_id] = of(UNKNOWN)
    return made


def _of_sentencepiece(piece: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


def text_of(
    pieces: Sequence[bytes], tokens: Sequence[int], segments: Sequence[int]
) -> tuple[str, np.ndarray]:
    """The text that tokens stand for, with a BREAK between segments and for what is in none (0),
    and each token's characters [T, 2] in it; several tokens may share one.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text, spans, before = "", [], 0
    for token, segment in zip(tokens, segments, strict=True):
        if segment != before or segment == 0:
            text += decoder.decode(b"", final=True) + BREAK
            decoder.reset()
        start = len(text)
        text += decoder.decode(pieces[token]) if segment else ""
        spans.append((start, len(text) + bool(decoder.getstate()[0])))
        before = segment
    return text + decoder.decode(b"", final=True), np.asarray(spans, np.int64).reshape(-1, 2)


# --------------------------------------------------------------------------------------------------
# names in texts


class Names(NamedTuple):
    """Names and their numbers by their first words, the longest first."""

    by_first: dict[str, list[tuple[str, int]]]


@functools.lru_cache(maxsize=1)
def _words() -> re.Pattern[str]:
    """Words, and all else character by character. Python's own \\w leaves out marks, which words of
    Hindi are full of.
    """

    def of(c):
        return unicodedata.category(chr(c))[0] == "M"

    runs = [
        list(run)
        for mark, run in itertools.groupby([*range(0x300, 0x20000), *range(0xE0100, 0xE01F0)], of)
        if mark
    ]
    marks = "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in runs) + "\u200c\u200d"
    return re.compile(
        f"[{_NO_BLANKS}][{marks}]*|(?:(?![{_NO_BLANKS}])[\\w{UNKNOWN}]|[{marks}])+|.", re.DOTALL
    )


def make_names(names: Iterable[tuple[str, int]]) -> Names:
    """Of (name, number); blanks at a name's ends do not count, and of two numbers of one name the
    first does.
    """
    numbers: dict[str, int] = {}
    for name, number in names:
        if said := _blanks(name).strip():
            numbers.setdefault(said, number)
    by_first: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
    for name in sorted(numbers, key=len, reverse=True):
        by_first[next(_words().finditer(name)).group()].append((name, numbers[name]))
    return Names(dict(by_first))


def find_names(names: Names, text: str) -> list[tuple[int, int, int]]:
    """(first character, end, number of the name) of each name in a text, from the left, the longest
    at a place: whole words.
    """
    text = _blanks(text)
    words = [(m.start(), m.group()) for m in _words().finditer(text)]
    ends, found, done = {len(text), *(start for start, _ in words)}, [], 0
    for start, word in words:
        if start < done:
            continue
        for name, number in names.by_first.get(word, ()):
            if start + len(name) in ends and text.startswith(name, start):
                done = start + len(name)
                found.append((start, done, number))
                break
    return found


def _blanks(text: str) -> str:
    """The same text with each kind of blank a plain one."""
    return re.sub(r"\s", " ", text)
