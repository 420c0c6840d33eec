"""What a comparison measures of a model beside its metrics: forgetting, sizes, speed, and what each
layer is made of.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from peft_jax.core.attachment import Attachment
from peft_jax.core.partition import count
from peft_jax.core.select import layer_paths
from peft_jax.core.tree import nodes_in, places
from peft_jax.data.source import SourceConfig
from peft_jax.generation.generate import generate
from peft_jax.knowledge.inputs import reads_knowledge
from peft_jax.low_rank.svd import Factorized
from peft_jax.pruning.masked import base_of
from peft_jax.pruning.prune import sparsity_of
from peft_jax.quantization.quantize import bits_per_weight
from peft_jax.quantization.quantized import Quantized
from peft_jax.recipes.export import ADAPTER, BASE
from peft_jax.recipes.run_config import RunConfig
from peft_jax.recipes.setup import Setup, subject_in
from peft_jax.training.evaluate import perplexity
from peft_jax.training.rows import text_rows
from peft_jax.training.tasks import objective_of

GENERATES = ("causal_lm",)


def write_own_texts(config: RunConfig, setup: Setup, path: Path) -> None:
    """Texts that the base writes by itself, drawn as it predicts them: what it knows before."""
    c = config.compare
    if not path.is_file():
        texts = generate(
            setup.model,
            setup.params,
            [[start_of(setup)]] * c.own_texts,
            tokenizer=setup.tokenizer,
            max_tokens=c.own_tokens,
            temperature=1.0,
            eos_token_id=[],
        )
        decoded = [setup.tokenizer.decode(t, skip_special_tokens=True) for t in texts]
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in decoded if text.strip()]
        beside = path.with_name(f".{path.name}")
        beside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        beside.replace(path)


def start_of(setup: Setup) -> int:
    """The token that a text begins with."""
    known = (setup.tokenizer.bos_token_id, setup.tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)


def loss_on(config: RunConfig, setup: Setup, params: Any, source: SourceConfig) -> float:
    """The loss on other text, nats per token."""
    subject = subject_in(config, setup)
    plain = subject._replace(data=subject.data.as_text())
    found = perplexity(
        setup.model,
        params,
        text_rows(subject, source),
        batch_size=config.train.batch_size,
        mesh=setup.mesh,
        objective=objective_of(plain),
    )
    return found["loss"]


def tokens_per_second(config: RunConfig, setup: Setup, params: Any) -> float | None:
    """Greedy generation without an end, the faster of two after one that compiles; None for a model
    that does not continue texts.
    """
    if setup.model.task not in GENERATES:
        return None
    c, apply = config.compare, reads_knowledge(setup.model)
    prompts = [[start_of(setup)]] * c.generate_rows
    times = []
    for _ in range(3):
        start = time.perf_counter()
        generate(apply, params, prompts, max_tokens=c.generate_tokens, eos_token_id=[])
        times.append(time.perf_counter() - start)
    return c.generate_rows * c.generate_tokens / min(times[1:])


def device_bytes(params: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(x.nbytes for x in jax.tree.leaves(params))


def stored_parameters(folder: Path, params: Any) -> int:
    """Parameters that the task's result consists of: of an adapter over the base as it was, its
    own; else all of the model that are not zero.
    """
    if (folder / ADAPTER).is_dir() and not (folder / BASE).is_dir():
        return count(params)[0]
    shares = sparsity_of(params)
    return sum(_stored(x, shares.get(path)) for path, x in places(params).items())


def _stored(x: Any, zeros: np.ndarray | None) -> int:
    if isinstance(x, Attachment):
        return _size(x)
    base = base_of(x)
    beside = _size(x) - _size(base)  # an adapter's arrays
    if isinstance(base, Factorized):
        return beside + _size(base)
    share = 0.0 if zeros is None else float(np.mean(zeros))
    return beside + round(math.prod(base.shape) * (1.0 - share))


def _size(x: Any) -> int:
    return sum(a.size for a in jax.tree.leaves(x))


def layers_of(params: Any) -> list[dict[str, Any]]:
    """weight, layer (-1: of none), sparsity, bits and rank of each linear layer's weight; of
    experts their means.
    """
    found, tree = [], places(params)
    for path, zeros in sparsity_of(params).items():
        node = tree[path]
        shares = np.atleast_1d(zeros)
        shares = shares.reshape(len(shares), -1).mean(1)
        stacked = len(shares) if np.ndim(zeros) else None
        what = {"bits": _bits(node), "rank": _rank(node)}
        for (name, number), share in zip(layer_paths(path, stacked), shares, strict=True):
            at = -1 if number is None else number
            weight = name.split("/")[-2]
            found.append({"weight": weight, "layer": at, "sparsity": float(share), **what})
    return found


def _bits(node: Any) -> float:
    """Bits of a weight as it is stored, without what lies over it."""
    stored = [w for w in nodes_in(node) if isinstance(w, Quantized)]
    if stored:
        return float(bits_per_weight(stored[0]))
    return 8.0 * base_of(node).dtype.itemsize


def _rank(node: Any) -> int | None:
    ranks = [r for w in nodes_in(node) if isinstance(r := getattr(w, "rank", None), int)]
    return ranks[0] if ranks else None


def remove_states(folder: Path, names: Sequence[str]) -> None:
    """Take away what only a run that goes on reads."""
    for name in names:
        for path in (*folder.glob(name), *folder.glob(f"stages/*/{name}")):
            shutil.rmtree(path, ignore_errors=True)
