"""Independent references of methods: Hugging Face PEFT, transformers, and formulas in NumPy.

A method's record names its reference: "PEFT" (what is saved is run by PEFT), "transformers" (the
merged model is run by PyTorch), or a formula, as a function or by its dotted name. A formula is
`(node, w) -> w'` for a node in the place of a weight w [in, out], and `(node, y, *args) -> y'` for
one beside a module that puts out y for args. A node's arrays are NumPy's, in float64.
"""

from __future__ import annotations

import functools
import math
import pkgutil
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np
import peft
import torch
from peft.tuners.boft.layer import BOFTLayer

import peft_jax
from peft_jax.core import Weight, materialize, places
from peft_jax.core.attachment import Attachment, Shared
from peft_jax.core.prepare import distribute
from tests.reference import FAMILIES, perturb, random_tokens, relative_error, torch_model

BOUND = 2e-5  # of the largest relative error, in float32
TOKENS = random_tokens(2, 7)
TOKENS[:, ::3] = 3  # a token that examples name
# A decoder with biases; LLaMA-Adapter's is without, since PEFT adds the gated part after the output
# projection, whose bias then counts again.
FAMILY = {"adaption_prompt": "llama2"}


class Base(NamedTuple):
    """A small decoder with a head of its own."""

    config: Any
    model: Any
    params: Any

    def torch(self) -> Any:
        return torch_model(self.config)

    def run(self, params: Any) -> np.ndarray:
        return np.asarray(peft_jax.bind(self.model)(params, TOKENS))

    def logits(self) -> np.ndarray:
        return torch_logits(self.torch())


@functools.cache
def base_of(family: str) -> Base:
    config = FAMILIES[family]()
    config.tie_word_embeddings, config.num_hidden_layers = False, 2
    with tempfile.TemporaryDirectory() as folder:
        torch_model(config).save_pretrained(folder)
        return Base(config, *peft_jax.load(folder, scan_layers=False))


def check(method: Any) -> float:
    """The largest relative error of a method against its reference.

    Raises AssertionError where it names none, does nothing, or is off by more than `BOUND`.
    """
    assert method.reference is not None, f"method {method.name} names no independent reference"
    base = base_of(FAMILY.get(method.name, "llama3_tied_biased"))
    moved = perturb(method(base.params, jax.random.key(1), **method.example))
    if method.reference in MODELS:
        ours, theirs, before = MODELS[method.reference](base, moved)
        pairs = [(method.name, ours, theirs, before)]
    else:
        formula = method.reference
        formula = pkgutil.resolve_name(formula) if isinstance(formula, str) else formula
        pairs = [*weights(moved, method, formula), *modules(base, moved, method, formula)]
    assert pairs, f"method {method.name} puts none of its nodes {method.nodes} into a decoder"
    assert any(relative_error(theirs, before) > 1e-4 for *_, theirs, before in pairs)
    errors = {path: relative_error(ours, theirs) for path, ours, theirs, _ in pairs}
    worst = max(errors, key=lambda path: errors[path])
    assert errors[worst] < BOUND, f"method {method.name} at {worst} is off by {errors[worst]:.1e}"
    return errors[worst]


def by_peft(base: Base, moved: Any) -> Any:
    """(our logits, PEFT's of the saved adapter, the base's)."""
    with tempfile.TemporaryDirectory() as folder:
        peft_jax.save_adapter(folder, moved)
        theirs = peft.PeftModel.from_pretrained(base.torch(), folder).eval()
    config = theirs.peft_config["default"]
    tasks = {"task_ids": torch.zeros(len(TOKENS), dtype=torch.long)}
    more = tasks if hasattr(config, "num_tasks") else {}
    return base.run(moved), torch_logits(theirs, **more), base.logits()


def by_transformers(base: Base, moved: Any) -> Any:
    """(our logits, PyTorch's of the merged model, the base's)."""
    with tempfile.TemporaryDirectory() as folder:
        peft_jax.save(folder, base.model, peft_jax.merge(moved))
        theirs = type(base.torch()).from_pretrained(folder, attn_implementation="eager").eval()
    return base.run(moved), torch_logits(theirs), base.logits()


MODELS = {"PEFT": by_peft, "transformers": by_transformers}


def torch_logits(model: Any, **more: Any) -> np.ndarray:
    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        logits = model(tokens, attention_mask=torch.ones_like(tokens), **more).logits
    return logits[:, -tokens.shape[1] :].numpy()


def weights(moved: Any, method: Any, formula: Any) -> Any:
    """(path, the changed matrix, the formula's, the base) for each Weight of the method."""
    for path, w in places(distribute(moved)).items():
        if isinstance(w, method.nodes) and isinstance(w, Weight):
            before = np.asarray(materialize(w.base), np.float64)
            yield path, w.materialize(), formula(as_numpy(w), before), before


def modules(base: Base, moved: Any, method: Any, formula: Any) -> Any:
    """(path, what it puts out, the formula's, what the module does) for each call of a module with
    an attachment of the method.
    """
    calls: list[Any] = []
    kinds = [n for n in method.nodes if issubclass(n, Attachment) and n is not Shared]
    undo = {kind: kind.around for kind in kinds}

    def spied(kind: Any) -> Any:
        def around(self: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
            seen: list[Any] = []

            def inner(*a: Any, **k: Any) -> Any:
                seen.append(call(*a, **k))
                return seen[-1]

            result = undo[kind](self, inner, *args, **kwargs)
            calls.append((self, args, seen[-1], result))
            return result

        return around

    for kind in kinds:
        kind.around = spied(kind)
    try:
        if kinds:
            base.run(moved)
    finally:
        for kind, around in undo.items():
            kind.around = around
    for i, (node, args, before, result) in enumerate(calls):
        before, result = (x[0] if isinstance(x, tuple) else x for x in (before, result))
        theirs = formula(as_numpy(node), as_numpy(before), *as_numpy(args))
        if theirs is not None:
            yield f"{type(node).__name__} {i}", result, theirs, before


def as_numpy(x: Any) -> Any:
    """A tree with its numbers in float64."""

    def convert(a: Any) -> Any:
        a = np.asarray(a) if isinstance(a, jax.Array) else a
        real = isinstance(a, np.ndarray) and a.dtype.kind == "f"
        return a.astype(np.float64) if real else a

    return jax.tree.map(convert, x)


# --------------------------------------------------------------------------------------------------
# formulas


def straight_through_int8(node: Any, w: np.ndarray) -> np.ndarray:
    """Rounded to whole multiples of max|w| / 127.5 an output (Jacob et al. 2017, symmetric), the
    largest negative one to -128.
    """
    scale = np.abs(w).max(0) / 127.5
    code = np.where(w < -127.499 * scale, -128, np.round(w / scale))
    return np.clip(code, -128, 127) * scale


def largest_half(node: Any, w: np.ndarray) -> np.ndarray:
    """The larger half of the entries (Zhou et al. 2021, equation 3, unstructured)."""
    order = np.argsort(np.abs(w), axis=None)
    kept = np.ones(w.size)
    kept[order[: w.size // 2]] = 0
    return w * kept.reshape(w.shape)


_erf = np.vectorize(math.erf)
ACTIVATIONS = {
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + _erf(x / 2**0.5)) / 2,
}


def layer_norm(x: np.ndarray, norm: Any) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * norm[0] + norm[1]


def bottleneck(node: Any, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """y + s g up(f(down(norm(h)))), h = y or, in parallel, x (Houlsby et al. 2019, section 2; He et
    al. 2021, table 1; the gate g, Mao et al. 2022, section 3).
    """
    given = x if node.parallel else y
    h = given if node.before is None else layer_norm(given, node.before)
    down, up = node.down, node.up
    if isinstance(down, dict):
        rule = node.shared["rule"]
        down, up = (hypercomplex(rule, m["left"] @ m["right"]) for m in (down, up))
    biases = [0 if b is None else b for b in (node.down_bias, node.up_bias)]
    h = ACTIVATIONS[node.activation](h @ down + biases[0]) @ up + biases[1]
    h = h * node.scaling * (1 if node.scale is None else node.scale)
    if node.gating_weight is not None:
        h = h / (1 + np.exp(-(given @ node.gating_weight + node.gating_bias)))
    return y + h


def hypercomplex(rule: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """The sum of Kronecker products (Karimi Mahabadi et al. 2021, equation 5)."""
    return sum(np.kron(a, b) for a, b in zip(rule, parts, strict=True))


def reft(node: Any, y: np.ndarray, x: np.ndarray, *shared: Any) -> np.ndarray:
    """h + R^T (W h + b - R h) at the first and last tokens (Wu et al. 2024, equation 2)."""
    q, r = np.linalg.qr(node.projection)
    q = q * np.sign(np.diag(r))
    edited = y + (y @ node.source + node.source_bias - y @ q) @ q.T
    t = np.arange(y.shape[1])
    chosen = (t < node.first) | (t >= y.shape[1] - node.last)
    return np.where(chosen[:, None], edited, y)


def invertible(node: Any, y: np.ndarray, *_: Any) -> Any:
    """The additive coupling of NICE (Dinh et al. 2015, section 3.2); its inverse goes before a tied
    head, which is not here.
    """
    if not hasattr(node, "first"):
        return None

    def net(layers: Any, x: np.ndarray) -> np.ndarray:
        (w, b), (v, c) = layers
        return np.maximum(x @ w + b, 0) @ v + c

    a, b = np.split(y, 2, axis=-1)
    a = a + net(node.first, b)
    return np.concatenate([a, b + net(node.second, a)], axis=-1)


def mixture(node: Any, y: np.ndarray, *args: Any) -> Any:
    """A mixture's adapters, and attention with its prefix, gated for each token or not."""
    if hasattr(node, "down"):
        return bottleneck(node, y, args[0])
    if not hasattr(node, "keys"):
        return None
    operands = args[0]
    return attention_with_prefix(
        node, *map(np.asarray, (operands.query, operands.key, operands.value))
    )


def attention_with_prefix(node: Any, q: Any, k: Any, v: Any) -> np.ndarray:
    """Causal attention of q [B, T, H, d] over P keys and values in front (Li and Liang 2021), whose
    weights count g times as much (Mao et al. 2022).
    """
    (B, T, H, d), (K, P) = q.shape, (k.shape[2], node.length)
    k, v = (
        np.concatenate([np.broadcast_to(p.reshape(1, P, K, d), (B, P, K, d)), x], axis=1)
        for p, x in ((node.keys, k), (node.values, v))
    )
    k, v = (np.repeat(x, H // K, axis=2) for x in (k, v))
    weight = np.exp(np.einsum("bthd,bshd->bhts", q, k) / d**0.5)
    weight[..., P:] *= np.tril(np.ones((T, T)))
    if node.gating_weight is not None:
        logit = q.reshape(B, T, -1) @ node.gating_weight + node.gating_bias
        weight[..., :P] *= (1 / (1 + np.exp(-logit)))[:, None]
    return np.einsum("bhts,bshd->bthd", weight / weight.sum(-1, keepdims=True), v)


def quantized_groups(node: Any, w: np.ndarray) -> np.ndarray:
    """W + s P A B, with P the mean over an input's group times the number of groups, as PEFT's
    QALoRA pools (Xu et al. 2023, algorithm 1, up to a factor).
    """
    groups = node.a.shape[0]
    size = w.shape[0] // groups
    pool = np.kron(np.eye(groups), np.full((size, 1), groups / size))
    return w + node.scale * (pool @ node.a @ node.b)


def butterfly(node: Any, w: np.ndarray) -> np.ndarray:
    """s R W, R the product of the factors P D P^T (Liu et al. 2024, section 4), with PEFT's
    permutations. (PEFT's layer has more than one factor on a GPU only.)
    """
    factors, blocks, b = node.r.shape[:3]
    for i, part in enumerate(node.r):
        skew = (part - part.swapaxes(-1, -2)) / 2
        turns = (np.eye(b) - skew) @ np.linalg.inv(np.eye(b) + skew)
        diagonal = torch.block_diag(*torch.tensor(turns)).numpy()
        order = BOFTLayer.block_butterfly_perm(
            None, blocks * b, blocks // 2**i, b // 2, factors - 1
        )
        P = BOFTLayer.perm2mat(None, order).numpy()
        w = P @ diagonal @ P.T @ w
    return w * node.s
