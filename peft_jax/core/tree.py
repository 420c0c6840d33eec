"""Parameter trees with nodes: paths, selection of places, partition into what trains and what does not, merging.

A path is written with slashes, as in `model/layers/self_attn/q_proj/kernel`.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from flax.core import meta

from peft_jax.core.attachment import Attachment, Shared
from peft_jax.core.weight import Layout, Node, Trainable, Weight, materialize, matrix_shape

logger = logging.getLogger("peft_jax")
# A module that holds the layers of a stack: `layers` [L, ...] where they are stacked, `layers_0`, `layers_1`, ... where not.
STACKS = ("layers", "layer", "h", "block")
_NUMBERED = re.compile(rf"\b({'|'.join(STACKS)})_(\d+)\b")
EXPERTS = ("gate_up_proj", "down_proj")  # weights of stacked experts, [E, in, out]
# Beside an `embedding` [V, D]: what the tied head multiplies with in its place, [V, D].
OUTPUT_EMBEDDING = "output_embedding"
OUTPUT_HEADS = (
    "lm_head", "head", "logits", "unembed", "output_projection", "score", "classifier", "qa_outputs",
)  # fmt: skip
VECTORS = ("bias", "scale")
_UNBOX = {meta.AxisMetadata: "flax.linen.meta.unbox", nnx.Variable: "flax.nnx.to_pure_dict"}  # boxes -> what takes them off
Targets = str | Sequence[str]


def is_node(x: Any) -> bool:
    """Whether `x` is a Weight or an Attachment."""
    return isinstance(x, Node)


def path_str(path: Any) -> str:
    """A key path as a string with slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def places(params: Any) -> dict[str, Any]:
    """path -> array or node, nodes not entered."""
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: is_node(x) or isinstance(x, tuple(_UNBOX)))[0]
    for path, leaf in leaves:
        if call := next((call for box, call in _UNBOX.items() if isinstance(leaf, box)), None):
            raise ValueError(f"{path_str(path)} is boxed ({type(leaf).__name__}); call {call} first")
    return {path_str(path): leaf for path, leaf in leaves}


def map_places(fn: Callable[[str, Any], Any], params: Any) -> Any:
    """The tree with each array or node replaced by `fn(path, it)`."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(path_str(path), leaf), params, is_leaf=is_node)


def _names(path: str) -> tuple[str, str]:
    """(the full path, the path of the module that owns it)."""
    return path, path.rpartition("/")[0]


def matches(path: str, target: str) -> bool:
    """Whether a place belongs to a target.

    A target is a glob over the place's path or its module's path, a name or trailing part of the module's path
    ("q_proj", "self_attn.q_proj"), or a regular expression written `re:...` that must match the whole path.
    """
    full, module = _names(path)
    if target.startswith("re:"):
        return any(re.fullmatch(target[3:], name) for name in (full, module))
    target = target.replace(".", "/")
    return any(name == target or name.endswith("/" + target) or fnmatch.fnmatchcase(name, target) for name in (full, module))


def stack_of(w: Any) -> list[Any]:
    """A place's nodes, outermost first."""
    found = []
    while is_node(w):
        found.append(w)
        w = getattr(w, "base", None)
    return found


def select(params: Any, targets: Targets = "all-linear", exclude: Targets = (), *, min_ndim: int = 2) -> list[str]:
    """Paths of the places that `targets` name, in the order of the tree.

    `targets` is "all-linear" (every `kernel` except the output head's), one target or several; see `matches`.
    Places with fewer than `min_ndim` axes are passed over; a `bias` or `scale` counts as one axis, stacked or not.
    Raises ValueError for a target that matches nothing.
    """
    return list(select_layers(params, targets, exclude, min_ndim=min_ndim))


def select_layers(
    params: Any,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    layers: Sequence[int] | None = None,
    layout: Layout | None = None,
    *,
    min_ndim: int = 2,
) -> dict[str, tuple[tuple[str, ...], tuple[bool, ...]]]:
    """path -> (names of its layers, which of them are chosen), as `select`, for stacked layers one by one.

    Targets may name layers ("layers.3.self_attn.q_proj"); `layers` restricts them to these numbers.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    unwanted = [exclude] if isinstance(exclude, str) else list(exclude)
    candidates = {}
    for p, w in places(params).items():
        if not isinstance(w, Attachment) and _ndim(p, w) >= min_ndim:
            lead = matrix_shape(w.shape, *(layout or {}).get(p, ((-2,), (-1,))))[0] if w.ndim >= 2 else ()
            candidates[p] = layer_paths(p, lead[0] if lead else None)
    for kind, patterns in (("target", wanted), ("exclude", unwanted)):
        for pattern in patterns:
            if not any(_named(p, name, pattern) for p, names in candidates.items() for name, _ in names):
                raise ValueError(_nothing(kind, pattern, list(candidates)))
    numbers = {i for names in candidates.values() for _, i in names if i is not None}
    if layers is not None and (missing := set(layers) - numbers):
        raise ValueError(
            f"there is no layer {min(missing)}; layers here: {min(numbers, default=0)} to {max(numbers, default=0)}"
        )

    def chosen(path: str, name: str, number: int | None) -> bool:
        return (
            any(_named(path, name, t) for t in wanted)
            and not any(_named(path, name, t) for t in unwanted)
            and (layers is None or number in layers)
        )

    flags = {p: tuple(chosen(p, name, i) for name, i in names) for p, names in candidates.items()}
    found = {p: (tuple(name for name, _ in candidates[p]), f) for p, f in flags.items() if any(f)}
    if not found:
        raise ValueError(f"targets {wanted} with exclude {unwanted} leave no place")
    return found


def first_present(paths: Iterable[str], alternatives: Sequence[Sequence[str]]) -> Sequence[str]:
    """The first of several lists of targets, one for each family of models, all of which name one of `paths`.

    The first list where none does, so that the error names what is usual.
    """
    paths = list(paths)
    there = lambda target: any(matches(p, target) for p in paths)
    return next((a for a in alternatives if all(map(there, a))), alternatives[0])


def is_target(path: str, w: Any, targets: Targets, exclude: Targets = ()) -> bool:
    """Whether `targets` name the place at `path`, as `select` has it; for one array before its tree is whole."""
    wanted, unwanted = ([t] if isinstance(t, str) else list(t) for t in (targets, exclude))
    named = lambda patterns: any(_named(path, path, t) for t in patterns)
    return _ndim(path, w) >= 2 and named(wanted) and not named(unwanted)


def layer_paths(path: str, layers: int | None) -> list[tuple[str, int | None]]:
    """(path, layer number) for each of the `layers` stacked ones at `path`, or for the one layer that the path names."""
    parts, at = path.split("/"), stack_at(path)
    if layers is not None and at is not None:
        return [("/".join([*parts[:at], str(i), *parts[at:]]), i) for i in range(layers)]
    numbered = None if at is not None else re.search(r"(?:^|[/_])(\d+)/", path)
    name, number = number_layers(path), int(numbered[1]) if numbered else None
    return [(name, number)] if layers is None else [(name, i if number is None else number) for i in range(layers)]


def stack_at(path: str) -> int | None:
    """Where a layer's number belongs among the parts of a path of stacked layers; None where it has none, or has it already
    (a list of NNX modules).
    """
    parts = path.split("/")
    at = next((i for i, part in enumerate(parts, 1) if part in STACKS), None)
    return None if at is not None and at < len(parts) and parts[at].isdigit() else at


def layer_axes(params: Any) -> Any:
    """The tree of `params` with, for each array, how many of its leading axes count layers: 1 in a stack, else 0.

    A stack is a module of a stack's name whose arrays all begin with an axis of one size.
    """
    stacks: dict[str, set[tuple[int, ...]]] = {}
    for path, x in places(params).items():
        if (at := stack_at(path)) is not None:
            stacks.setdefault("/".join(path.split("/")[:at]), set()).update(a.shape[:1] for a in jax.tree.leaves(x))
    stacked = tuple(f"{name}/" for name, sizes in stacks.items() if len(sizes) == 1 and () not in sizes)
    return map_places(lambda path, x: jax.tree.map(lambda _: int(path.startswith(stacked)), x), params)


def number_layers(path: str) -> str:
    """A path with the numbers of looped layers as parts of their own: `layers_3/mlp` becomes `layers/3/mlp`."""
    return _NUMBERED.sub(r"\1/\2", path)


def _named(path: str, name: str, target: str) -> bool:
    """Whether a target names a place, or its layer called `name`."""
    return _is_linear(path) if target == "all-linear" else matches(path, target) or matches(name, target)


def _ndim(path: str, w: Any) -> int:
    return min(w.ndim, 1) if path.rpartition("/")[2] in VECTORS else w.ndim


def _is_linear(path: str) -> bool:
    *module, name = path.split("/")
    last = module[-1] if module else ""
    return (name == "kernel" and last not in OUTPUT_HEADS) or (name in EXPERTS and last == "experts")


def nearest(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?" with a leading blank, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _nothing(kind: str, target: str, candidates: list[str]) -> str:
    names = sorted({p.split("/")[-2] for p in candidates if "/" in p}) or sorted(candidates)
    tied = target.rpartition(".")[2] == "lm_head" and any(p.endswith("/embedding") for p in candidates)
    more = " The head is the embedding; peft_jax.untie(params) gives it one of its own, output_embedding." if tied else ""
    return f"{kind} {target!r} matches nothing.{nearest(target, names)}{more} Modules here: {', '.join(names)}"


def by_pattern(path: str, default: Any, pattern: Mapping[str, Any]) -> Any:
    """The value of the first key of `pattern` that matches `path` (PEFT's rank_pattern and alpha_pattern)."""
    return next((value for key, value in pattern.items() if matches(path, key)), default)


def check_patterns(paths: Iterable[str], **patterns: Mapping[str, Any]) -> None:
    """Raise ValueError for a pattern key that matches none of `paths`."""
    paths = list(paths)
    for name, pattern in patterns.items():
        for key in pattern:
            if not any(matches(p, key) for p in paths):
                raise ValueError(_nothing(name, key, paths))


def trainable_mask(params: Any) -> Any:
    """The tree of `params` with True for each array that trains.

    An array trains where the innermost node around it lists its field in `trainable` and is not frozen.
    """

    def mask(x: Any, trains: bool) -> Any:
        if is_node(x):
            return x.replace(**{f: mask(getattr(x, f), f in x.trainable and not x.frozen) for f in data_fields(x)})
        return jax.tree.map(lambda y: mask(y, False) if is_node(y) else trains, x, is_leaf=is_node)

    return mask(params, False)


def data_fields(node: Any) -> list[str]:
    """Names of a node's fields that hold arrays or nodes."""
    return [f.name for f in dataclasses.fields(node) if not f.metadata.get("static")]


def map_nodes(fn: Callable[[Any], Any], x: Any) -> Any:
    """The container x (a node's field) with each node in it replaced by `fn(node)`."""
    return jax.tree.map(lambda y: fn(y) if is_node(y) else y, x, is_leaf=is_node)


def _descended(node: Any) -> list[str]:
    """The data fields without a bank's adapters, which have neither rows nor randomness of their own."""
    return [f for f in data_fields(node) if f != "adapters"]


def partition(params: Any) -> tuple[Any, Any]:
    """(trainable, frozen): two trees like `params` with None where the other one has an array."""
    mask = trainable_mask(params)
    return (
        jax.tree.map(lambda m, x: x if m else None, mask, params),
        jax.tree.map(lambda m, x: None if m else x, mask, params),
    )


def combine(trainable: Any, frozen: Any) -> Any:
    """The tree whose `partition` is (trainable, frozen)."""
    return jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda x: x is None)


def freeze(params: Any, targets: Targets = "*") -> Any:
    """Nodes whose path matches `targets` no longer train (their inner nodes neither).

    Raises ValueError for a target other than "*" that names no node.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    nodes = [p for p, x in places(params).items() if is_node(x)]
    for target in wanted:
        if target != "*" and not any(matches(p, target) for p in nodes):
            raise ValueError(_nothing("freeze", target, nodes))

    def inner(x: Any) -> Any:
        if not is_node(x):
            return map_nodes(inner, x)
        return x.replace(frozen=True, **{f: inner(getattr(x, f)) for f in data_fields(x)})

    return map_places(lambda path, x: inner(x) if any(matches(path, t) for t in wanted) else x, params)


def merge(params: Any) -> Any:
    """Every Weight replaced by what it amounts to: updates folded into their base (and bias). Attachments stay.

    An update over a pruned weight fills its zeros, which is said in a warning: `mask_updates` keeps them.
    """
    if filled := [p for p, x in places(params).items() if _fills_zeros(x)]:
        logger.warning(
            f"merging fills the zeros of {len(filled)} pruned weights, {filled[0]} the first; peft_jax.mask_updates(params) "
            "before training keeps them"
        )
    whole = distribute(params)
    beside = biased(whole)

    def fold(path: str, x: Any) -> Any:
        if isinstance(x, Attachment):
            return _return_shared(x)
        x = x.merge() if isinstance(x, Weight) else x
        return beside[path].bias(materialize(x)).astype(x.dtype) if path in beside else x

    merged = map_places(fold, whole)
    if not isinstance(merged, Mapping):
        return merged
    needed = {f"shared_{getattr(x, 'group', '')}" for x in places(params).values() if isinstance(x, Attachment)}
    return {k: x for k, x in merged.items() if not isinstance(x, Shared) or k in needed}


def biased(params: Any) -> dict[str, Weight]:
    """path of a bias -> the Weight in the place of `kernel` beside it."""
    known = places(params)
    kernels = {p.rpartition("/")[0]: x for p, x in known.items() if p.endswith("/kernel") and isinstance(x, Weight)}
    return {f"{module}/bias": x for module, x in kernels.items() if f"{module}/bias" in known}


def _fills_zeros(x: Any) -> bool:
    """Whether a node that is not pruned lies over one that is."""
    if not is_node(x) or getattr(x, "pruned", False):
        return False
    inner = [getattr(x, f) for f in data_fields(x)]
    return any(getattr(y, "pruned", False) or _fills_zeros(y) for y in inner)


def unmerge(merged: Any, params: Any) -> Any:
    """The tree of `params` (with its adapters) over bases recovered from `merged`; equal up to rounding."""
    known, whole = places(merged), distribute(params)
    beside = biased(whole)

    def back(path: str, x: Any) -> Any:
        value = known.get(path, x)
        if path in beside:
            value = beside[path].recover_bias(materialize(value))
        if isinstance(x, Attachment):
            return _return_shared(x)
        return _return_shared(x.unmerge(value)) if isinstance(x, Weight) else value

    return map_places(back, whole)


def distribute(params: Any) -> Any:
    """Nodes given the arrays that they share (see `Shared`), repeated over their leading axes."""
    groups = {k: x for k, x in params.items() if isinstance(x, Shared)} if isinstance(params, Mapping) else {}
    if not groups:
        return params

    def fill(_: str, x: Any) -> Any:
        return _fill_shared(x, groups)

    return map_places(fill, params)


def _fill_shared(x: Any, groups: Mapping[str, Shared]) -> Any:
    if not is_node(x):
        return map_nodes(lambda y: _fill_shared(y, groups), x)
    changes = {f: _fill_shared(getattr(x, f), groups) for f in data_fields(x)}
    if group := getattr(x, "group", ""):
        if (source := groups.get(f"shared_{group}")) is None:
            raise ValueError(f"the tree lacks 'shared_{group}', which its {type(x).__name__} nodes need")
        arrays = {**source.fixed, **source.trained}
        changes["shared"] = {n: jax.numpy.broadcast_to(a, (*getattr(x, "lead", ()), *a.shape)) for n, a in arrays.items()}
    return x.replace(**changes)


def _return_shared(x: Any) -> Any:
    if not is_node(x):
        return map_nodes(_return_shared, x)
    changes = {f: _return_shared(getattr(x, f)) for f in data_fields(x)}
    return x.replace(**{**changes, **({"shared": None} if getattr(x, "group", "") else {})})


def full(params: Any, key: Any = None, *, targets: Targets = "*", exclude: Targets = ()) -> Any:
    """Full fine-tuning: the arrays that `targets` name train as they are, and of pruned and factorized weights what they
    keep. `key` is not used.
    """
    paths = set(select(params, targets, exclude, min_ndim=0))

    def train(x: Any) -> Any:
        return x if isinstance(x, Attachment) else x.train() if isinstance(x, Weight) else Trainable(x)

    return map_places(lambda p, x: train(x) if p in paths else x, params)


def resolve(params: Any) -> Any:
    """Nodes that are an array as it is used replaced by the array."""
    return map_places(lambda _, x: x.resolved() if isinstance(x, Weight) else x, params)


def prepare(params: Any, rng: jax.Array | None = None, adapter_ids: Any = None) -> Any:
    """The tree as `bind` runs it: shared arrays, randomness and the rows' adapters handed to the nodes."""
    return resolve(link(with_adapter_ids(with_rng(distribute(params), rng), adapter_ids)))


def link(params: Any) -> Any:
    """Attachments given what they need of the rest of the tree (`Attachment.linked`)."""
    return map_places(lambda path, x: x.linked(params, path) if isinstance(x, Attachment) else x, params)


def cache_slots(params: Any) -> int:
    """Slots of a key/value cache that the tree's attachments take before the first token."""
    return sum(x.slots for x in places(params).values() if isinstance(x, Attachment))


def with_rng(params: Any, rng: jax.Array | None) -> Any:
    """Stochastic nodes given a key each (one per slice of their leading axes), folded in by their place."""
    if rng is None:
        return params

    def inner(x: Any, key: jax.Array) -> Any:
        if not is_node(x):
            return map_nodes(lambda y: inner(y, key), x)
        x = x.drawn(rng)
        changes = {f: inner(getattr(x, f), jax.random.fold_in(key, 1)) for f in _descended(x) if f != "key"}
        if x.stochastic:
            changes["key"] = jax.random.split(key, x.lead) if x.lead else key
        return x.replace(**changes)

    counter = iter(range(10**9))
    return map_places(lambda _, x: inner(x, jax.random.fold_in(rng, next(counter))), params)


def with_adapter_ids(params: Any, ids: jax.Array | None) -> Any:
    """Nodes that hold a bank of adapters told which one each row of the batch uses: `ids` [B]."""
    if ids is None:
        return params
    ids = jax.numpy.asarray(ids)

    def inner(x: Any) -> Any:
        if not is_node(x):
            return map_nodes(inner, x)
        changes = {f: inner(getattr(x, f)) for f in _descended(x) if f != "ids"}
        if x.routed:
            changes["ids"] = jax.numpy.broadcast_to(ids, (*x.lead, *ids.shape))
        return x.replace(**changes)

    return map_places(lambda _, x: inner(x), params)


def penalty(params: Any) -> Any:
    """What the nodes' `penalty` methods add to the loss; 0 where none has one.

    It is their sum, or for an adapter whose nodes also tell the number of their `penalty_terms` the mean over all of its terms
    (AdaLoRA's orthogonality).
    """
    sums: dict[Any, Any] = {}
    terms: dict[Any, Any] = {}
    for node in (n for x in places(params).values() for n in _nodes(x) if hasattr(n, "penalty")):
        group = (type(node), getattr(node, "name", ""))
        sums[group] = sums.get(group, 0.0) + node.penalty()
        if hasattr(node, "penalty_terms"):
            terms[group] = terms.get(group, 0.0) + node.penalty_terms()
    return sum(total / terms[group] if group in terms else total for group, total in sums.items())


def _nodes(x: Any) -> Iterator[Any]:
    """The nodes in a place, those within others too."""
    if not is_node(x):
        for y in jax.tree.leaves(x, is_leaf=is_node):
            yield from _nodes(y) if is_node(y) else ()
        return
    yield x
    for f in data_fields(x):
        yield from _nodes(getattr(x, f))


def count(params: Any) -> tuple[int, int]:
    """(trained, all) parameters; all counts logical weights, not the arrays of nodes."""
    trainable, _ = partition(params)
    trained = sum(x.size for x in jax.tree.leaves(trainable))
    total = 0
    for x in places(params).values():
        total += sum(a.size for a in jax.tree.leaves(x)) if isinstance(x, Attachment) else math.prod(x.shape)
    return trained, total
