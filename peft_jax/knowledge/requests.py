"""Facts to put into a model: records of edits, as CounterFact has them, and their tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peft_jax.core.files import numbered_lines, open_text
from peft_jax.data.spans import Span, fill, tokens_of, with_offsets


class Edit(NamedTuple):
    """A fact: `prompt` with one {} for the `subject`, what is to follow (`target`), and what does
    (`true`), where known.

    `paraphrases` are whole prompts that ask the same, `neighbours` whole prompts of which `true` is
    and stays the answer, `portability` whole prompts with answers that follow from the fact in one
    step more.
    """

    prompt: str
    subject: str
    target: str
    true: str = ""
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    portability: tuple[tuple[str, str], ...] = ()

    @property
    def question(self) -> str:
        """The prompt with its subject. Raises ValueError unless it has {} once."""
        return fill(self.prompt, self.subject)[0]

    @property
    def place(self) -> Span:
        """Where the subject stands in the question."""
        return fill(self.prompt, self.subject)[1]


class EditRows(NamedTuple):
    """Prompts with what follows them, padded on the right: int32 tokens, targets and segment_ids
    [N, T], float32 weights [N, T] on what follows, and the place of the subject's last token, int32
    [N].
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    segment_ids: np.ndarray
    subject_at: np.ndarray


def read_edits(path: Path) -> list[Edit]:
    """The edits of a .json (a list) or .jsonl file: objects with prompt, subject and target, and,
    where there is one, true, paraphrases, neighbours and portability (a list of [prompt, answer]).
    CounterFact's own records are read too.

    Raises ValueError naming the file and the record for one that is malformed, and as `check_edits`
    does.
    """
    if not path.is_file():
        raise FileNotFoundError(f"file of edits {path} does not exist")
    try:
        if path.suffix == ".jsonl":
            values = [(f"{path}:{n}", json.loads(line)) for n, line in numbered_lines(path)]
        else:
            with open_text(path) as file:
                values = [(f"{path}, record {n}", value) for n, value in enumerate(json.load(file))]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    edits = [_edit(value, where) for where, value in values]
    check_edits(edits)
    return edits


def _edit(value: Any, where: str) -> Edit:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: an edit is an object with prompt, subject and target")
    if "requested_rewrite" in value:
        wanted = value["requested_rewrite"]
        value = {
            "prompt": wanted["prompt"],
            "subject": wanted["subject"],
            "target": wanted["target_new"]["str"],
            "true": wanted["target_true"]["str"],
            "paraphrases": value.get("paraphrase_prompts", []),
            "neighbours": value.get("neighborhood_prompts", []),
        }
    for name in ("prompt", "subject", "target"):
        if not isinstance(value.get(name), str) or not value[name]:
            raise ValueError(f"{where}: {name!r} should be a text, got {value.get(name)!r}")
    for name in ("paraphrases", "neighbours"):
        texts = value.get(name, [])
        if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise ValueError(f"{where}: {name!r} should be a list of texts")
    hops = value.get("portability", [])
    if not isinstance(hops, list) or not all(
        isinstance(h, list) and [type(x) for x in h] == [str, str] for h in hops
    ):
        raise ValueError(f"{where}: 'portability' should be a list of [prompt, answer]")
    try:
        fill(value["prompt"], value["subject"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return Edit(
        value["prompt"],
        value["subject"],
        value["target"],
        value.get("true") or "",
        tuple(value.get("paraphrases", [])),
        tuple(value.get("neighbours", [])),
        tuple((p, a) for p, a in hops),
    )


def check_edits(edits: Sequence[Edit]) -> None:
    """Raise ValueError where there is none, a prompt has not one {} for its subject, or two want
    different answers to one question.
    """
    if not edits:
        raise ValueError("there are no edits")
    wanted: dict[str, str] = {}
    for edit in edits:
        if wanted.setdefault(edit.question, edit.target) != edit.target:
            both = f"{wanted[edit.question]!r} and {edit.target!r}"
            raise ValueError(f"the edits of {edit.question!r} contradict each other: {both}")


def joined(prompt: str, answer: str) -> str:
    """A prompt with one blank and its answer, whatever blanks the two bring; the prompt as it is
    without an answer.
    """
    return f"{prompt.rstrip()} {answer.lstrip()}" if answer.strip() else prompt


def edit_rows(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], places: Sequence[Span] = ()
) -> EditRows:
    """Rows of prompts, each with a blank and its answer; `places`, where given, are the subjects'
    characters in the prompts.

    Rows are as long as the longest, and at most 7 tokens more. Raises ValueError where no token
    stands for a subject.
    """
    made = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        encoded = with_offsets(tokenizer, joined(prompt, answer))
        ids, spans = _without_end(encoded["input_ids"], encoded["offset_mapping"], tokenizer)
        at = tokens_of(prompt, spans, places[i])[1] - 1 if places else len(ids) - 1
        asked = len(prompt.rstrip()) if answer.strip() else len(prompt)
        answers_ids = np.asarray([b > asked for _, b in spans])
        made.append((np.asarray(ids, np.int32), answers_ids, at))
    T, N = -(-max(len(ids) for ids, _, _ in made) // 8) * 8, len(made)  # few lengths, few programs
    rows = EditRows(
        np.zeros((N, T), np.int32),
        np.zeros((N, T), np.int32),
        np.zeros((N, T), np.float32),
        np.zeros((N, T), np.int32),
        np.asarray([at for *_, at in made], np.int32),
    )
    for i, (ids, answer, _) in enumerate(made):
        n = len(ids)
        rows.tokens[i, :n], rows.segment_ids[i, :n] = ids, 1
        rows.targets[i, : n - 1], rows.weights[i, : n - 1] = ids[1:], answer[1:]
    return rows


def _without_end(
    ids: list[int], spans: list[tuple[int, int]], tokenizer: Any
) -> tuple[list[int], list[tuple[int, int]]]:
    ends = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    return (ids[:-1], spans[:-1]) if ends else (ids, spans)
