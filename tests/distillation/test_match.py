"""Different tokenizers: places where both have read the same text, tokens that both have."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import peft_jax
from peft_jax.data import Record
from peft_jax.distillation.match import encode_twofold, shared_tokens, tokenizer_hash

TEXTS = ["It was the best of times, it was the worst of times.", "Naïve: 3.14!", "a"]


@pytest.fixture(scope="module")
def ours():
    return peft_jax.load_tokenizer("builtin:base")


@pytest.fixture(scope="module")
def theirs():
    """Words and single characters, without a token before the text."""
    words = ["<unk>", "</s>", "It", "was", "the", "best", "of", "times", ",", ".", "it", "worst"]
    letters = [c for c in "abcdefghijklmnopqrstuvwxyzN\u00ef:3.14!" if c not in words]
    tokenizer = Tokenizer(
        models.WordLevel(
            {w: i for i, w in enumerate([*words, *dict.fromkeys(letters)])}, unk_token="<unk>"
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def records(*texts):
    return [Record({"text": t}, "") for t in texts]


def read_with(tokenizer, ids, at):
    """How many characters of the text have been read with the token at `at`, by decoding."""
    return len(tokenizer.decode(ids[: at + 1], skip_special_tokens=True))


def test_compared_places_have_read_the_same_text(ours):
    """The same tokenizer, a context for the teacher: every place of the student's has one."""
    context = "Answer like Dickens.\n"
    rows = encode_twofold(records(*TEXTS), ours, ours, 24, context=context)
    for i, text in enumerate(TEXTS):
        n = int(rows.compared[i].sum())
        assert n == int(rows.weights[i].sum()) == int((rows.segment_ids[i] > 0).sum())
        for a, b in zip(rows.compared_at[i, :n], rows.teacher_at[i, :n], strict=True):
            mine = ours.decode(rows.tokens[i, : a + 1], skip_special_tokens=True)
            other = ours.decode(rows.teacher_tokens[i, : b + 1], skip_special_tokens=True)
            assert other == context + mine
            assert text.startswith(mine.rstrip("\ufffd"))
    assert (rows.targets[0, :5] == rows.tokens[0, 1:6]).all()


def test_other_tokenizers_meet_at_common_ends(ours, theirs):
    rows = encode_twofold(records(*TEXTS), ours, theirs, 32)
    n = int(rows.compared[0].sum())
    text, ends = TEXTS[0], []
    encoded = theirs(text, return_offsets_mapping=True)["offset_mapping"]
    for a, b in zip(rows.compared_at[0, :n], rows.teacher_at[0, :n], strict=True):
        end = read_with(ours, rows.tokens[0].tolist(), a)
        assert end == encoded[b][1]
        ends.append(end)
    words = [i + len(w) for w in ("times", "worst") for i in [text.index(w)]]
    assert set(words) <= set(ends)
    assert ends == sorted(set(ends))


def test_by_position_it_is_the_first_of_each(ours, theirs):
    rows = encode_twofold(records(TEXTS[0]), ours, theirs, 32, alignment="position")
    n = int(rows.compared[0].sum())
    np.testing.assert_array_equal(rows.compared_at[0, :n], np.arange(n))
    np.testing.assert_array_equal(rows.teacher_at[0, :n], np.arange(n))


def test_of_completions_only_these_are_compared(ours):
    record = Record({"prompt": "Where? ", "completion": "In London."}, "")
    rows = encode_twofold([record], ours, ours, 24)
    n = int(rows.compared[0].sum())
    for a in rows.compared_at[0, :n]:
        assert read_with(ours, rows.tokens[0].tolist(), a) >= len("Where? ")
    assert 0 < rows.weights[0].sum() == n


def test_shared_tokens_stand_for_the_same_text(ours, theirs):
    mine, other = shared_tokens(ours, theirs)
    found = {theirs.convert_ids_to_tokens(int(b)) for b in other}
    assert {"It", ",", "."} <= found
    assert len(mine) == len(other) == len(set(mine.tolist())) == len(set(other.tolist()))
    for a, b in zip(mine.tolist(), other.tolist(), strict=True):
        assert ours.decode([a]) == theirs.decode([b]) or a == ours.eos_token_id
    same = shared_tokens(ours, ours)
    np.testing.assert_array_equal(*same)
    assert tokenizer_hash(ours) != tokenizer_hash(theirs)


def test_slow_tokenizers_and_texts_without_a_place_are_refused(ours):
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow gives no character offsets"):
        encode_twofold(records("a"), ours, Slow(), 8)
    with pytest.raises(ValueError, match="no text of which both tokenizers have a common place"):
        encode_twofold(records("a"), ours, ours, 8, context="x" * 400, teacher_length=2)
