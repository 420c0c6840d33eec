"""Records made into examples by several processes, in the order of the records."""

from __future__ import annotations

import collections
import itertools
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, NamedTuple

from peft_jax.data.encode import PLAIN, ChatOptions, Example, encode
from peft_jax.data.readers import Record
from peft_jax.data.skipped import MalformedRecordError, Skipped

BLOCK = 1024  # records that a process takes at a time


class _Task(NamedTuple):
    """What a process works with."""

    tokenizer: Any
    chat: ChatOptions
    on_error: str


class _Collected(Skipped):
    """What a process passes over, for the one that asked to tell of."""

    def __init__(self) -> None:
        super().__init__(shown=0)
        self.errors: list[str] = []

    def add(self, error: Exception | str, told: bool = True) -> None:
        self.errors.append(str(error))


_task: _Task | None = None


def _start(task: _Task) -> None:
    global _task
    _task = task


def _encoded(records: list[Record]) -> tuple[list[Example], list[str]]:
    assert _task is not None
    skipped = _Collected()
    made = encode(
        records, _task.tokenizer, on_error=_task.on_error, chat=_task.chat, skipped=skipped
    )
    return list(made), skipped.errors


def encode_with(
    workers: int,
    records: Iterable[Record],
    tokenizer: Any,
    *,
    on_error: str = "skip",
    chat: ChatOptions = PLAIN,
    skipped: Skipped | None = None,
) -> Iterator[Example]:
    """The examples of `encode`, made by so many processes; by this one where there are none.

    Few blocks of records are under way at a time, so memory does not grow with the data.
    """
    skipped = Skipped() if skipped is None else skipped
    if workers == 0:
        yield from encode(records, tokenizer, on_error=on_error, chat=chat, skipped=skipped)
        return
    task = _Task(tokenizer, ChatOptions(dict(chat.options), chat.turns), on_error)
    context = multiprocessing.get_context("spawn")  # threads of JAX do not outlive a fork
    source, waiting = iter(records), collections.deque[Future[Any]]()
    with ProcessPoolExecutor(workers, context, _start, (task,)) as pool:
        while True:
            while len(waiting) < 2 * workers and (block := list(itertools.islice(source, BLOCK))):
                waiting.append(pool.submit(_encoded, block))
            if not waiting:
                break
            made, errors = waiting.popleft().result()
            for error in errors:
                skipped.add(MalformedRecordError(error))
            yield from made
