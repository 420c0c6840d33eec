"""Places in texts and in tokens: what is put in is not searched for, names are whole words, tokens
are those of the place.
"""

import re

import pytest
import transformers

from peft_jax.data.spans import (
    fill,
    find_names,
    make_names,
    text_of,
    token_bytes,
    tokens_of,
    with_offsets,
)


@pytest.fixture(scope="module", params=["embedded", "gpt2", "bert_uncased", "mistral_v1"])
def tokenizer(request, tokenizer_of):
    return tokenizer_of(request.param)


PLACES = [  # template, subject
    ("{} plays in Annecy, the city of", "Ann"),  # at the start, and inside of a word behind
    ("Annecy is the city where {} plays", "Ann"),  # inside of a word before
    ("Of Rome the capital is {}", "Rome"),  # twice, and at the end
    ("{}ville lies north of Ann", "Ann"),  # the word goes on
    ("the town of {} is", "漢字"),  # characters of several tokens
    ("{} is", "漢"),
    ("the city of {}’s mayor", "Łódź"),
    ("where does {} play", " Ann "),  # blanks of its own
    ("a {}", "C++"),
]


@pytest.mark.parametrize(("template", "subject"), PLACES)
def test_the_subjects_last_token_ends_its_characters(template, subject, tokenizer):
    """By what the tokens say, decoded from the left until the subject is there whole."""
    text, (start, end) = fill(template, subject)
    assert text == template.replace("{}", subject)
    assert text[start:end] == subject
    encoded = with_offsets(tokenizer, text)
    first, stop = tokens_of(text, encoded["offset_mapping"], (start, end))

    def plain(said):
        return re.sub(r"\s|\[UNK\]", "", said).lower()

    def said(n):
        return plain(
            tokenizer.decode(
                encoded["input_ids"][:n],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
        )

    if tokenizer.unk_token_id in encoded["input_ids"] and tokenizer.bos_token_id is None:
        pytest.skip("what WordPiece does not know cannot be decoded")
    before, through = (
        plain(
            tokenizer.backend_tokenizer.normalizer.normalize_str(t)
            if tokenizer.bos_token_id is None
            else t
        )
        for t in (text[:start], text[: start + len(subject.rstrip())])
    )
    assert said(stop).startswith(through), "the last token has not come"
    assert not said(stop - 1).startswith(through), "the last token comes before"
    assert before.startswith(said(first).rstrip("�")), "the first token is behind"


def test_a_template_has_one_place():
    with pytest.raises(
        ValueError, match=r"the prompt 'in \{\} near \{\}' has \{\} 2 times: write the subject out"
    ):
        fill("in {} near {}", "Ann")
    with pytest.raises(ValueError, match=r"the prompt 'in' has no \{\} for its subject"):
        fill("in", "Ann")
    assert fill("say {}", "{}") == ("say {}", (4, 6))


def test_a_place_without_a_token_is_refused(tokenizer):
    offsets = with_offsets(tokenizer, "a  b")["offset_mapping"]
    with pytest.raises(ValueError, match="no token stands for '  ' in 'a  b'"):
        tokens_of("a  b", offsets, (1, 3))


def test_tokenizers_without_offsets_are_refused():
    slow = transformers.ByT5Tokenizer()
    for use in (lambda: with_offsets(slow, "a"), lambda: token_bytes(slow)):
        with pytest.raises(ValueError, match="ByT5Tokenizer gives no character offsets"):
            use()


TEXTS = [
    "Ann plays in Annecy, the city",
    "東京 Łódź’s Perú… x",
    "in (Peru); Go, not Google. C++ e\u0301t",
    "a\nb  c\td",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_of_tokens_is_the_tokenizers(text, tokenizer):
    """As the tokenizer itself decodes it, and each token's characters as its offsets say."""
    encoded = with_offsets(tokenizer, text, add_special_tokens=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    said, spans = text_of(token_bytes(tokenizer), ids, [1] * len(ids))
    assert said[0] == "\0"

    def plain(t):
        return re.sub(r"\s+", "", t.replace("[UNK]", "\ufffd"))

    assert plain(said[1:]) == plain(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    if tokenizer.unk_token_id in ids or tokenizer.bos_token_id is None:
        return  # WordPiece writes other characters than the text's
    for (a, b), (c, d) in zip(spans, offsets, strict=True):
        assert said[a:b].strip() == text[c:d].strip() or said[a:b] == " "


@pytest.mark.parametrize(
    ("names", "text", "found"),
    [
        ("Go", "Google, Gogo; Go. Go", ["Go", "Go"]),
        ("Ann Annecy", "Annecy is not (Ann)", ["Annecy", "Ann"]),
        ("York New_York", "New York, New Yorkshire, York", ["New York", "York"]),
        ("New_York", "New\nYork", ["New\nYork"]),
        ("Per", "Per Perú Per\u0301u Per2 Per_ Per-x Per’s", ["Per", "Per", "Per"]),
        ("ann Łódź", "Łódź Łódźka éann", ["Łódź"]),
        ("राम", "रामायण में राम", ["राम"]),  # vowel signs are marks, and parts of words
        ("дом", "домой, дом", ["дом"]),
        ("東京 Go", "我在東京都用Go寫", ["東京", "Go"]),  # no blanks between words
        ("ゴー", "ゴーグルとゴー", ["ゴー"]),  # katakana stands in words
        ("C++ C", "C++, C and C#", ["C++", "C", "C"]),
        ("e", "e\u0301", []),
    ],
)
def test_names_are_whole_words_and_the_longest(names, text, found):
    known = make_names((name.replace("_", " "), i) for i, name in enumerate(names.split()))
    assert [text[a:b] for a, b, _ in find_names(known, text)] == found
