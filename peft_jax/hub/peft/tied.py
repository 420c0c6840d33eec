"""Adapters of models whose head is their embedding, as Hugging Face PEFT means them.

PEFT has a module for the embedding and one for the head even where both hold the same weight, so an
adapter of one of them leaves the other as it was, unless it says `ensure_weight_tying`. Trainable
tokens are tied without saying so. A tree has one embedding [V, D] for both; where an adapter tells
them apart, the head's comes to lie beside it (`untie`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from peft_jax.core.attachment import Attachment, module_at
from peft_jax.core.reparametrised import Replacement, replace_array, replacement
from peft_jax.core.select import OUTPUT_EMBEDDING
from peft_jax.core.sharding import fetch
from peft_jax.core.tree import map_places, places, stack_of
from peft_jax.core.weight import materialize
from peft_jax.hub.names import embedding_name, stack_size, tensors_of
from peft_jax.hub.peft.formats import Config, Module, PeftFormat, Tensors, format_of
from peft_jax.hub.peft.trainable_tokens import FORMAT as TOKENS
from peft_jax.models.families import FAMILIES, tied_head, untie

# with the rows of trainable tokens: the ids that a tied head takes from its embedding
_IDS = "token_indices"
# The modules that PEFT trains whole by itself, and expects in the file, by the adapter's task.
_OWN_MODULES = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def tie_of(params: Any) -> tuple[str, str] | None:
    """(place of the embedding, Hugging Face's name of the head that is the same weight); None where
    they are apart.
    """
    found = tied_head(params)
    if found is None or OUTPUT_EMBEDDING in module_at(params, found[0]):
        return None
    return f"{found[0]}/embedding", found[1]


def check_look_up(modules: Iterable[str]) -> None:
    """Raise ValueError for one of Hugging Face's modules that holds the embedding but looks nothing
    up (T5's `shared`).
    """
    idle = {f.embedding.replace("/", "."): f.look_ups for f in FAMILIES.values() if f.look_ups}
    for module in modules:
        if module in idle:
            raise ValueError(
                f"PEFT's adapter of {module} changes nothing, since {' and '.join(idle[module])} "
                "look tokens up by modules of "
                "their own; use this package's own format"
            )


# --------------------------------------------------------------------------------------------------
# reading


def put_stored(params: Any, tensors: Tensors, config: Config, name: str) -> Any:
    """`params` with the weights that PEFT stores beside an adapter but did not train; they are
    taken out of `tensors`.

    Such are embeddings that were resized, the bases of adapted embeddings, and heads. Raises
    ValueError for a tied pair of which the file holds two different ones.
    """
    if (
        (found := tied_head(params))
        and (tensor := f"{found[1]}.bias") in tensors
        and (own := _head_bias(params))
    ):
        tensors[own] = tensors.pop(tensor)
    weights = {t.removesuffix(".weight") for t in tensors if t.endswith(".weight")}
    still = {m for m in weights if not _is_saved(m, config.get("modules_to_save") or ())}
    trained = ("bias",) if config.get("bias", "none") != "none" else ()
    names = [
        t for t in tensors if t.rpartition(".")[0] in still and t.rpartition(".")[2] not in trained
    ]
    stored = {t: tensors.pop(t) for t in names}
    if tie := tie_of(params):
        _join_stored(stored, f"{embedding_name(tie[0])}.weight", f"{tie[1]}.weight")

    known = places(params)

    def put(path: str, w: Any) -> Any:
        new = read_replacement(path, w, stored, lambda _: "base", name, known)
        return w if new is w or np.array_equal(new.value, fetch(materialize(w))) else new

    result = map_places(put, params) if stored else params
    tensors |= stored  # what has no place is said by who reads the rest
    return result


def read_replacement(
    path: str,
    w: Any,
    tensors: Tensors,
    kind: Callable[[str], str],
    name: str,
    known: Mapping[str, Any],
) -> Any:
    """The array or Weight w at a place of `known` under the adapter's own array from these tensors,
    which are taken out.

    `kind` says from a tensor's name what it is (`saved_as`). Of a stack, only the layers that have
    a tensor are replaced.
    """
    if not hasattr(w, "shape"):
        return w
    all_layers = tensors_of(path, stack_size(path, w))
    if not (mine := [t for t in all_layers if t.name in tensors]):
        return w
    value = np.array(fetch(materialize(w)))
    for t in mine:
        t.put(value, tensors.pop(t.name), "the adapter")
    if (
        isinstance(w, Replacement) and w.name == name
    ):  # what was stored beside the adapter, and is trained too
        w = w.base
    given = {t.layer for t in mine}
    flags = tuple(t.layer in given for t in {t.layer: t for t in all_layers}.values())
    return replace_array(
        path, w, kind(mine[0].name), name, known, value=jnp.asarray(value), chosen=flags
    )


def _head_bias(params: Any) -> str | None:
    """The name of the bias of a tied head that lies beside the head and not in it (BERT's
    `cls.predictions.bias`).
    """
    found = tied_head(params)
    outer = found[1].rpartition(".")[0] if found else ""
    return (
        f"{outer}.bias" if outer and "bias" in module_at(params, outer.replace(".", "/")) else None
    )


def _is_saved(module: str, names: Any) -> bool:
    """PEFT's rule: the module, or one that it is in, ends with one of the names."""
    parts = module.split(".")
    return (
        any(".".join(parts[:i]).endswith(tuple(names)) for i in range(1, len(parts) + 1))
        if names
        else False
    )


def _join_stored(stored: Tensors, embedding: str, head: str) -> None:
    """The head's stored weight as the embedding's, since PEFT loads both into one parameter."""
    if head not in stored:
        return
    value = stored.pop(head)
    if not np.array_equal(stored.setdefault(embedding, value), value):
        raise ValueError(
            f"the adapter holds two different weights {embedding} and {head}, which are one in a "
            "model that ties them"
        )


def split_tie(
    params: Any,
    modules: dict[str, Tensors],
    tokens: dict[str, Tensors],
    extras: Tensors,
    config: Config,
    kind: PeftFormat | None,
) -> Any:
    """The tree that an adapter's tensors fit: with the head's own embedding where they tell it from
    the look-up's; `kind` is None where it has nodes in no module.

    Where they do not, what they repeat for the head is taken out.
    """
    tie = tie_of(params)
    if tie is None:
        return params
    embedding, head = embedding_name(tie[0]), tie[1]
    together = [
        _same_nodes(modules, embedding, head, config, kind, places(params)[tie[0]].shape),
        _same_rows(tokens, embedding, head, config),
        _same_weights(extras, f"{embedding}.weight", f"{head}.weight", config),
    ]
    if all(together):
        for found, name in ((modules, head), (tokens, head), (extras, f"{head}.weight")):
            found.pop(name, None)
        return params
    rows = modules if kind is TOKENS else tokens
    if embedding in rows and _same_rows(rows, embedding, head, config):
        rows[head] = {**rows[embedding], _IDS: _ids(rows[embedding], embedding, config)}
    return untie(params)


def _same_nodes(
    modules: Mapping[str, Tensors],
    embedding: str,
    head: str,
    config: Config,
    kind: PeftFormat | None,
    shape: tuple[int, ...],
) -> bool:
    """Whether the adapter's updates of the embedding and of the head are each other's transpose, or
    there are none.
    """
    if kind is TOKENS:
        return _same_rows(modules, embedding, head, config)
    if embedding not in modules and head not in modules:
        return True
    if kind is None or kind.mirror is None or not {embedding, head} <= set(modules):
        return False
    V, D = shape
    cls, fields = kind.read(modules[embedding], config, Module(embedding, V, D, True))
    other, others = kind.read(modules[head], config, Module(head, D, V, False))
    make: Any = other
    mirrored = kind.mirror(make(base=None, **others)) if cls is other else None
    return mirrored is not None and all(
        np.array_equal(getattr(mirrored, k), v) for k, v in fields.items()
    )


def _same_rows(tokens: Mapping[str, Tensors], embedding: str, head: str, config: Config) -> bool:
    """Whether trainable tokens are the embedding's, which PEFT ties the head to, unless the head
    has others of its own.
    """
    if head not in tokens:
        return True
    if embedding not in tokens:
        return False
    own = config.get("trainable_token_indices")
    own = isinstance(own, Mapping) and head in own
    if own:
        ids, others = (_ids(tokens[m], m, config) for m in (embedding, head))
        if not np.array_equal(ids, others):
            return False
    rows, others = (next(iter(tokens[m].values())) for m in (embedding, head))
    return np.array_equal(rows, others)


def _ids(rows: Tensors, module: str, config: Config) -> np.ndarray:
    return TOKENS.read(rows, config, Module(module, 2**31, 0, True))[1]["ids"]


def _same_weights(extras: Tensors, embedding: str, head: str, config: Config) -> bool:
    """Whether the whole embedding and the whole head that were trained are tied, or neither was
    trained.
    """
    if embedding not in extras and head not in extras:
        return True
    if not {embedding, head} <= set(extras) or config.get("ensure_weight_tying") is False:
        return False
    return np.array_equal(extras[embedding], extras[head])


# --------------------------------------------------------------------------------------------------
# writing


def for_head(node: Any, path: str) -> Any:
    """The node at a tied embedding as PEFT has it at the head. Raises ValueError where a PEFT
    folder cannot say it.
    """
    kind = format_of(node)
    made = kind.mirror(node) if kind is not None and kind.mirror is not None else None
    if made is None:
        raise ValueError(
            f"{path} is the head too, and PEFT's {type(node).__name__} of an embedding cannot "
            "change both alike; "
            "use this package's own format, or peft_jax.models.untie(params) first and adapt one "
            "of the two"
        )
    return made


def can_say(params: Any, nodes: Mapping[str, Any], task_type: str | None) -> bool:
    """Whether PEFT's format can say what these nodes do to a tied embedding."""
    tie = None if task_type == "FEATURE_EXTRACTION" else tie_of(params)
    node = nodes.get(tie[0]) if tie else None
    if node is None or isinstance(node, (Attachment, *TOKENS.nodes)):
        return True
    if any(f.look_ups and f"{f.embedding}/embedding" in nodes for f in FAMILIES.values()):
        return False
    if isinstance(node, Replacement):
        return True
    kind = format_of(node)
    return (
        kind is not None
        and kind.mirror is not None
        and kind.mirror(node.replace(base=None)) is not None
    )


def check_tokens(params: Any, tokens: Mapping[str, Any]) -> None:
    """Raise ValueError for tokens of a head or its embedding that PEFT would tie to other ones."""
    found = tied_head(params)
    if found is None or not tokens:
        return
    sides = [f"{found[0]}/{leaf}" for leaf in ("embedding", OUTPUT_EMBEDDING)]
    if OUTPUT_EMBEDDING not in module_at(params, found[0]) or sides[0] not in tokens:
        return
    one, other = tokens[sides[0]], tokens.get(sides[1])

    def same(a, b):
        return np.array_equal(fetch(a), fetch(b))

    if other is None or (same(one.ids, other.ids) and not same(one.rows, other.rows)):
        raise ValueError(
            f"{sides[0]} has trainable tokens that {sides[1]} has not, and PEFT ties them; use "
            "this package's own format"
        )


def tied_tensors(params: Any, tie: tuple[str, str] | None, name: str) -> Tensors:
    """The head's tensor where a tied embedding trains whole, and its bias, which PEFT has in the
    head.
    """
    found = tied_head(params)
    if found is None:
        return {}
    known = places(params)
    sides = [
        replacement(known.get(f"{found[0]}/{leaf}"), name)
        for leaf in ("embedding", OUTPUT_EMBEDDING)
    ]
    tensors = {f"{found[1]}.weight": fetch(sides[0].value)} if tie and sides[0] is not None else {}
    whole = sides[1] is not None or bool(tensors)
    if whole and (own := _head_bias(params)):
        tensors[f"{found[1]}.bias"] = fetch(materialize(_of(known[own.replace(".", "/")], name)))
    return tensors


def _of(w: Any, name: str) -> Any:
    """The array that the adapter `name` has in the place of w, else what lies under all
    adapters.
    """
    own = replacement(w, name)
    return own if own is not None else [w, *(n.base for n in stack_of(w) if hasattr(n, "base"))][-1]


def own_heads(params: Any, task_type: str | None, name: str) -> Tensors:
    """The tensors of the modules that PEFT trains whole by itself for a task, as the adapter `name`
    has them.

    Raises ValueError for one that is adapted, which PEFT would not do.
    """
    names = _OWN_MODULES.get(task_type or "", ())
    found: Tensors = {}
    for path, w in places(params).items():
        if isinstance(w, Attachment):
            continue
        for t in tensors_of(path, stack_size(path, w)):
            if not _is_saved(t.name.rpartition(".")[0], names):
                continue
            if any(
                getattr(n, "name", "") == name and not isinstance(n, Replacement)
                for n in stack_of(w)
            ):
                raise ValueError(
                    f"{path} is adapted, and for the task {task_type} PEFT trains it whole; leave "
                    "it out of the targets"
                )
            found[t.name] = t.take(fetch(materialize(_of(w, name))))
    return found
