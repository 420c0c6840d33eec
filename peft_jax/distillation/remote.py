"""A teacher behind an OpenAI-compatible endpoint that tells log-probabilities of prompts by token
id, as vLLM does.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np

from peft_jax.distillation.divergence import FLOOR

_TRIES = 3


def remote_top_k(
    url: str,
    model: str,
    rows: Sequence[Sequence[int]],
    k: int,
    *,
    key: str | None = None,
    timeout: float = 120.0,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each row of token ids (ids [n, k], log-probabilities [n, k + 1]) of what comes after each
    of its n tokens but the last, for which both are zeros: the endpoint tells of no token that it
    was not shown.

    Asks `POST {url}/completions` for `prompt_logprobs`. Raises ValueError naming the endpoint where
    it cannot be reached, refuses, or does not tell log-probabilities by token id, or fewer than k
    of them.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": [list(map(int, row)) for row in rows],
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": k,
    }
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    where = f"{url.rstrip('/')}/completions"
    answer = _post(where, body, headers, timeout)
    choices = sorted(answer.get("choices", []), key=lambda c: c.get("index", 0))
    if len(choices) != len(rows):
        raise ValueError(f"{where} gave {len(choices)} answers to {len(rows)} prompts")
    return [_parsed(choice, row, k, where) for choice, row in zip(choices, rows, strict=True)]


def _post(
    where: str, body: dict[str, Any], headers: dict[str, str], timeout: float
) -> dict[str, Any]:
    request = urllib.request.Request(
        where, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
    )
    last = ""
    for _ in range(_TRIES):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            if error.code < 500:
                text = error.read(200).decode(errors="replace")
                raise ValueError(f"{where} refused with status {error.code}: {text}") from error
            last = f"status {error.code}"
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} did not answer in JSON") from error
        except OSError as error:
            last = str(error)
    raise ValueError(f"{where} cannot be used, tried {_TRIES} times: {last}")


def _parsed(
    choice: dict[str, Any], row: Sequence[int], k: int, where: str
) -> tuple[np.ndarray, np.ndarray]:
    told = choice.get("prompt_logprobs")
    if not isinstance(told, list) or len(told) != len(row):
        raise ValueError(
            f"{where} tells no prompt_logprobs for each token, as vLLM does; it cannot be a teacher"
        )
    ids, log_probs = np.zeros((len(row), k), np.int64), np.zeros((len(row), k + 1), np.float32)
    for at, entry in enumerate(told[1:]):  # what is told of a token is what was expected before it
        try:
            known = sorted(((float(v["logprob"]), int(i)) for i, v in entry.items()), reverse=True)[
                :k
            ]
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{where} tells prompt_logprobs in another form than {{token id: {{logprob}}}}"
            ) from error
        if len(known) < k:
            raise ValueError(
                f"{where} told {len(known)} log-probabilities of token {at + 1}, not {k}; "
                "lower teach.k"
            )
        log_probs[at, :k], ids[at] = [v for v, _ in known], [i for _, i in known]
        rest = -np.expm1(np.logaddexp.reduce(log_probs[at, :k].astype(np.float64)))
        log_probs[at, k] = np.log(rest) if rest > 0 else FLOOR
    return ids, log_probs
