"""Which places of a tree are meant: targets, layers, patterns."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from peft_jax.core.attachment import Attachment
from peft_jax.core.registry import nearest
from peft_jax.core.roles import is_expert, role_of, stack_names
from peft_jax.core.tree import map_places, places
from peft_jax.core.weight import Layout, matrix_shape

# Beside an `embedding` [V, D]: what the tied head multiplies with in its place, [V, D].
OUTPUT_EMBEDDING = "output_embedding"
VECTORS = ("bias", "scale")
Targets = str | Sequence[str]


def _names(path: str) -> tuple[str, str]:
    """(the full path, the path of the module that owns it)."""
    return path, path.rpartition("/")[0]


def matches(path: str, target: str) -> bool:
    """Whether a place belongs to a target.

    A target is a glob over the place's path or its module's path, a name or trailing part of the
    module's path ("q_proj", "self_attn.q_proj"), or a regular expression written `re:...` that must
    match the whole path.
    """
    full, module = _names(path)
    if target.startswith("re:"):
        return any(re.fullmatch(target[3:], name) for name in (full, module))
    target = target.replace(".", "/")
    return any(
        name == target or name.endswith("/" + target) or fnmatch.fnmatchcase(name, target)
        for name in (full, module)
    )


def select(
    params: Any, targets: Targets = "all-linear", exclude: Targets = (), *, min_ndim: int = 2
) -> list[str]:
    """Paths of the places that `targets` name, in the order of the tree.

    `targets` is "all-linear" (every `kernel` except the output head's), one target or several; see
    `matches`. Places with fewer than `min_ndim` axes are passed over; a `bias` or `scale` counts as
    one axis, stacked or not. Raises ValueError for a target that matches nothing.
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
    """path -> (names of its layers, which of them are chosen), as `select`, for stacked layers one
    by one.

    Targets may name layers ("layers.3.self_attn.q_proj"); `layers` restricts them to these numbers.
    """
    candidates = {}
    for p, w in places(params).items():
        if not isinstance(w, Attachment) and _ndim(p, w) >= min_ndim:
            lead = (
                matrix_shape(w.shape, *(layout or {}).get(p, ((-2,), (-1,))))[0]
                if w.ndim >= 2
                else ()
            )
            names = layer_paths(p, lead[0] if lead else None)
            candidates[p] = Candidate(names, is_linear(p))
    flags = choose_layers(candidates, targets, exclude, layers)
    return {p: (tuple(name for name, _ in candidates[p].layers), f) for p, f in flags.items()}


class Candidate(NamedTuple):
    """What targets may name: (path, number) of each of its layers, and whether it is one of
    "all-linear".
    """

    layers: list[tuple[str, int | None]]
    linear: bool


def choose_layers(
    candidates: Mapping[str, Candidate],
    targets: Targets,
    exclude: Targets = (),
    layers: Sequence[int] | None = None,
    *,
    what: str = "place",
) -> dict[str, tuple[bool, ...]]:
    """path -> which of its layers are chosen, for the candidates of which any is.

    A candidate is a place, or a module, whose path then ends with a slash; the name of a list of
    modules names those in it. `what` it is called in messages. Raises ValueError for a target that
    matches nothing and a layer that is not there.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    unwanted = [exclude] if isinstance(exclude, str) else list(exclude)

    def named(path: str, name: str, target: str) -> bool:
        if target == "all-linear":
            return candidates[path].linear
        return any(matches(n, target) for n in (path, name, _of_list(path)))

    for kind, patterns in (("target", wanted), ("exclude", unwanted)):
        for t in patterns:
            if not any(named(p, n, t) for p, c in candidates.items() for n, _ in c.layers):
                raise ValueError(matches_nothing(kind, t, list(candidates), what))
    numbers = {i for c in candidates.values() for _, i in c.layers if i is not None}
    if layers is not None and (missing := set(layers) - numbers):
        raise ValueError(
            f"there is no layer {min(missing)}; layers here: {min(numbers, default=0)} to "
            f"{max(numbers, default=0)}"
        )

    def chosen(path: str, name: str, number: int | None) -> bool:
        return (
            any(named(path, name, t) for t in wanted)
            and not any(named(path, name, t) for t in unwanted)
            and (layers is None or number in layers)
        )

    flags = {p: tuple(chosen(p, n, i) for n, i in c.layers) for p, c in candidates.items()}
    found = {p: f for p, f in flags.items() if any(f)}
    if not found:
        raise ValueError(f"targets {wanted} with exclude {unwanted} leave no {what}")
    return found


def _of_list(path: str) -> str:
    """The path of the list that something is in; its own where it is in none."""
    return re.sub(r"(/\d+)+(/?)$", r"\2", path)


def is_target(path: str, w: Any, targets: Targets, exclude: Targets = ()) -> bool:
    """Whether `targets` name the place at `path`, as `select` has it; for one array before its tree
    is whole.
    """
    wanted, unwanted = ([t] if isinstance(t, str) else list(t) for t in (targets, exclude))

    def named(patterns):
        return any(is_linear(path) if t == "all-linear" else matches(path, t) for t in patterns)

    return _ndim(path, w) >= 2 and named(wanted) and not named(unwanted)


def layer_paths(path: str, layers: int | None) -> list[tuple[str, int | None]]:
    """(path, layer number) for each of the `layers` stacked ones at `path`, or for the one layer
    that the path names.
    """
    parts, at = path.split("/"), stack_at(path)
    if layers is not None and at is not None:
        return [("/".join([*parts[:at], str(i), *parts[at:]]), i) for i in range(layers)]
    numbered = None if at is not None else re.search(r"(?:^|[/_])(\d+)/", path)
    name, number = number_layers(path), int(numbered[1]) if numbered else None
    return (
        [(name, number)]
        if layers is None
        else [(name, i if number is None else number) for i in range(layers)]
    )


def stack_at(path: str) -> int | None:
    """Where a layer's number belongs among the parts of a path of stacked layers; None where it has
    none, or has it already (a list of NNX modules).
    """
    parts = path.split("/")
    stacks = stack_names()
    at = next((i for i, part in enumerate(parts, 1) if part in stacks), None)
    return None if at is not None and at < len(parts) and parts[at].isdigit() else at


def layer_axes(params: Any) -> Any:
    """The tree of `params` with, for each array, how many of its leading axes count layers: 1 in a
    stack, else 0.

    A stack is a module of a stack's name whose arrays all begin with an axis of one size.
    """
    stacks: dict[str, set[tuple[int, ...]]] = {}
    for path, x in places(params).items():
        if (at := stack_at(path)) is not None:
            stacks.setdefault("/".join(path.split("/")[:at]), set()).update(
                a.shape[:1] for a in jax.tree.leaves(x)
            )
    stacked = tuple(
        f"{name}/" for name, sizes in stacks.items() if len(sizes) == 1 and () not in sizes
    )
    return map_places(
        lambda path, x: jax.tree.map(lambda _: int(path.startswith(stacked)), x), params
    )


def number_layers(path: str) -> str:
    """A path with the numbers of looped layers as parts of their own: `layers_3/mlp` becomes
    `layers/3/mlp`.
    """
    return _numbered(stack_names()).sub(r"\1/\2", path)


@functools.lru_cache(maxsize=8)
def _numbered(stacks: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"\b({'|'.join(stacks)})_(\d+)\b")


def _ndim(path: str, w: Any) -> int:
    return min(w.ndim, 1) if path.rpartition("/")[2] in VECTORS else w.ndim


def is_linear(path: str) -> bool:
    """Whether "all-linear" names the place at `path`."""
    module, _, leaf = path.rpartition("/")
    if leaf == "kernel":
        return role_of(module) not in ("head", "labels")
    return is_expert(path)


def matches_nothing(kind: str, target: str, candidates: list[str], what: str = "place") -> str:
    """The message for a target that matches none of the candidates' paths."""
    none = "nothing" if what == "place" else f"no {what}"
    names = sorted({p.split("/")[-2] for p in candidates if "/" in p}) or sorted(candidates)
    tied = role_of(target.replace(".", "/")) == "head" and any(
        p.endswith("/embedding") for p in candidates
    )
    more = (
        " The head is the embedding; peft_jax.models.untie(params) gives it one of its own, "
        "output_embedding."
        if tied
        else ""
    )
    return (
        f"{kind} {target!r} matches {none}.{nearest(target, names)}{more} Modules here: "
        f"{', '.join(names)}"
    )


def by_pattern(path: str, default: Any, pattern: Mapping[str, Any]) -> Any:
    """The value of the first key of `pattern` that matches `path` (PEFT's rank_pattern and
    alpha_pattern).
    """
    return next((value for key, value in pattern.items() if matches(path, key)), default)


def check_patterns(paths: Iterable[str], **patterns: Mapping[str, Any]) -> None:
    """Raise ValueError for a pattern key that matches none of `paths`."""
    paths = list(paths)
    for name, pattern in patterns.items():
        for key in pattern:
            if not any(matches(p, key) for p in paths):
                raise ValueError(matches_nothing(name, key, paths))
