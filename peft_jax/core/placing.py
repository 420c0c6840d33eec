"""Where adapters stand: modules of a parameter tree chosen by name, and attachments put beside
their parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax

from peft_jax.core.attachment import Attachment, attach, is_list, module_at
from peft_jax.core.reparametrised import MATRIX, per_layer
from peft_jax.core.roles import Kind, described, hooks_of, role_of
from peft_jax.core.select import (
    VECTORS,
    Candidate,
    Targets,
    by_pattern,
    choose_layers,
    is_linear,
    layer_paths,
    matches,
)
from peft_jax.core.tree import places
from peft_jax.core.weight import Axes, Layout, matrix_shape


class Module(NamedTuple):
    """A module that an attachment is to stand beside.

    `lead` are the leading axes of its parameters (stacked layers), `layers` the path of each of
    them, `chosen` which of them are adapted; `n_in` and `n_out` the features that go in and come
    out.
    """

    path: str
    lead: tuple[int, ...]
    layers: tuple[str, ...]
    numbers: tuple[int, ...]
    chosen: tuple[bool, ...]
    n_in: int
    n_out: int

    @property
    def gate(self) -> jax.Array | None:
        """[*lead], 1 where a stacked layer is adapted; None where all are."""
        return None if all(self.chosen) else self.by_layer([float(c) for c in self.chosen])

    def by_layer(self, values: Sequence[float]) -> jax.Array:
        """A number per layer as an array [*lead]."""
        return per_layer(values, self.lead)

    def one_value(self, default: Any, pattern: Mapping[str, Any], option: str) -> Any:
        """The value that `pattern` gives the module; layers stacked together have to agree."""

        def of(name):
            return by_pattern(f"{name}/", by_pattern(f"{self.path}/", default, pattern), pattern)

        values = {of(name) for name in self.layers}
        if len(values) > 1:
            raise ValueError(
                f"{option} gives the layers stacked at {self.path} {sorted(map(str, values))}; "
                "unstack_layers first"
            )
        return values.pop()


def hidden_size(params: Any) -> int:
    """Features of the hidden states: those of the token embedding. Raises ValueError where there is
    none.
    """
    _, embedding = token_embedding(params)
    return embedding.shape[-1]


def token_embedding(params: Any, target: str | None = None) -> tuple[str, Any]:
    """(path of the module, embedding [V, D]) of the tokens' embedding.

    `target` names it where there are several `embedding`s. Raises ValueError where none or several
    are found.
    """
    known = {
        p.rpartition("/")[0]: w
        for p, w in places(params).items()
        if p.rpartition("/")[2] == "embedding"
    }
    found = {p: w for p, w in known.items() if target is None or matches(p + "/", target)}
    if len(found) > 1:
        named = {p: w for p, w in found.items() if _of_tokens(p)}
        found = named if len(named) == 1 else found
    if len(found) != 1:
        what = "no token embedding" if not found else f"several embeddings ({', '.join(found)})"
        raise ValueError(f"the tree has {what}; name the tokens' with embedding=")
    return next(iter(found.items()))


def _of_tokens(module: str) -> bool:
    """Whether an embedding is the tokens': by its role, or by a name that says so."""
    name = module.rpartition("/")[2]
    return role_of(module) == "embedding" or ("tok" in name and "type" not in name)


def token_stack(params: Any, target: str | None = None) -> tuple[Kind | Literal["model"], str]:
    """(what it is, path) of the module that tokens go into: a decoder's stack, an encoder's, the
    whole of an encoder-decoder of this package, or any other model.
    """
    module = token_embedding(params, target)[0]
    found = described(module)
    if found is None or found.role != "embedding" or not found.record.kind:
        return "model", ""
    path, kind = module.removesuffix(found.name).removesuffix("/"), found.record.kind
    if kind == "encoder-decoder":  # tokens go into all of it
        return (kind if {"encoder", "decoder"} <= set(params) else "model"), ""
    return (kind, path) if path else ("model", "")


def module_paths(params: Any) -> list[str]:
    """Paths of all modules of a tree, with the known ones that have no parameters (see `hooks_of`),
    lists of them left out.
    """
    found: list[str] = []

    def walk(tree: Any, path: str) -> None:
        if not isinstance(tree, Mapping):
            return
        if path and not is_list(tree):
            found.append(path)
        for name in [*tree, *(h for h in hooks_of(path, tree) if h not in tree)]:
            walk(tree.get(name, {}), f"{path}/{name}" if path else name)

    walk(params, "")
    return found


def modules_with_roles(params: Any) -> dict[str, list[str]]:
    """role -> paths of the modules of a tree that have it."""
    found: dict[str, list[str]] = {}
    for path in module_paths(params):
        if (role := role_of(path)) is not None:
            found.setdefault(role, []).append(path)
    return found


def attention_cores(params: Any) -> list[str]:
    """Paths of the attention cores of a model of this package."""
    inside = {p: module_at(params, p) for p in module_paths(params)}
    hooks = (f"{p}/{name}" for p, m in inside.items() for name in hooks_of(p, m))
    return [p for p in hooks if role_of(p) == "core"]


def find_modules(
    params: Any,
    targets: Targets,
    exclude: Targets = (),
    layers: Sequence[int] | None = None,
    layout: Layout | None = None,
    width: int | None = None,
) -> list[Module]:
    """The modules that `targets` name, in the order of the tree; targets as in
    `peft_jax.core.select`, but of modules. The name of a list of modules names those in it.

    A module with a `kernel` has that one's features, any other the hidden states' (`width`, by
    default the token embedding's). Raises ValueError for a target that matches nothing and a layer
    that is not there.
    """
    known = {f"{p}/": layers_of(params, p, layout) for p in module_paths(params)}

    def linear(path: str) -> bool:
        return "kernel" in module_at(params, path) and is_linear(f"{path}kernel")

    candidates = {
        p: Candidate([(f"{n}/", i) for n, i in names], linear(p)) for p, (_, names) in known.items()
    }
    flags = choose_layers(candidates, targets, exclude, layers, what="module")
    return [_module(params, p[:-1], *known[p], f, layout, width) for p, f in flags.items()]


def _module(
    params: Any,
    path: str,
    lead: tuple[int, ...],
    names: list[tuple[str, int | None]],
    flags: tuple[bool, ...],
    layout: Layout | None,
    width: int | None,
) -> Module:
    n_in, n_out = _features(params, path, layout, width)
    numbers = tuple(0 if i is None else i for _, i in names)
    return Module(path, lead, tuple(n for n, _ in names), numbers, flags, n_in, n_out)


def layers_of(
    params: Any, path: str, layout: Layout | None = None
) -> tuple[tuple[int, ...], list[tuple[str, int | None]]]:
    """(leading axes of a module, (path, number) of each of its layers)."""
    owner, kernels = path, []
    while owner and not (kernels := _kernels(params, owner, layout)):
        owner = owner.rpartition("/")[0]
    leads = [matrix_shape(w.shape, *axes)[0] for w, axes in (kernels if owner else [])]
    lead = min(leads, key=len, default=())
    names = layer_paths(path + "/", lead[0] if lead else None)
    return lead, [(n.strip("/"), i) for n, i in names]


def _kernels(params: Any, path: str, layout: Layout | None) -> list[tuple[Any, tuple[Axes, Axes]]]:
    """(weight, its axes) for the matrices below a module."""
    below = places(module_at(params, path)).items()
    return [
        (w, (layout or {}).get(f"{path}/{p}", MATRIX))
        for p, w in below
        if not isinstance(w, Attachment) and w.ndim >= 2 and p.rpartition("/")[2] not in VECTORS
    ]


def _features(params: Any, path: str, layout: Layout | None, width: int | None) -> tuple[int, int]:
    kernel = module_at(params, path).get("kernel")
    if kernel is not None:
        return matrix_shape(kernel.shape, *(layout or {}).get(f"{path}/kernel", MATRIX))[1:]
    width = width or hidden_size(params)
    return width, width


def place_attachments(
    params: Any,
    key: jax.Array,
    make: Callable[[Module, jax.Array], Attachment],
    kind: str,
    adapter: str,
    modules: Sequence[Module],
) -> Any:
    """`params` with `make(module, key)` beside each of `modules`, under the key
    `<kind>_<adapter>`.
    """
    keys = jax.random.split(key, len(modules))
    return attach(
        params,
        {m.path: {f"{kind}_{adapter}": make(m, k)} for m, k in zip(modules, keys, strict=True)},
    )
