"""Roles: what a model calls its modules, so that techniques ask for "keys" and not for a name.

A family says it once, in a record beside its modules (`Family.roles`); `register_roles` says it of
a model of the user's own. A name is a module's, or the end of its path where the name alone would
fit others too ("attention/output/dense"). Paths are asked one by one, and all records together
answer: the longest name that fits a path wins, among equal ones that of the latest record.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jax.sharding import PartitionSpec

from peft_jax.core.registry import Registry, nearest

Names = tuple[str, ...]
Kind = Literal["decoder", "encoder", "encoder-decoder"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)  # compared by identity, which is fast
class Roles:
    """What a family of models calls its modules, each role by one name or several.

    `kind` is what the module is that holds the layers and the token embedding, "" for other models.
    The last five stand for modules without parameters, which trees do not show: something may be
    attached to them.
    """

    name: str
    kind: Kind | Literal[""] = ""
    stack: Names = ()  # holds the layers, stacked ("layers") or numbered ("layers_0", ...)
    embedding: Names = ()  # of tokens, as its path from the module that tokens go into
    head: Names = ()  # hidden states to the vocabulary
    labels: Names = ()  # hidden states to anything else: small, and no "all-linear" target
    attention: Names = ()
    cross_attention: Names = ()
    q: Names = ()
    k: Names = ()
    v: Names = ()
    qkv: Names = ()  # the three as one
    relative: Names = ()  # projections of relative positions
    o: Names = ()
    feed_forward: Names = ()
    gate: Names = ()
    up: Names = ()
    gate_up: Names = ()  # the two as one
    down: Names = ()
    experts: Names = ()  # arrays [E, in, out] called as the roles gate_up and down
    router: Names = ()
    norms: Names = ()
    q_norm: Names = ()
    k_norm: Names = ()
    others: Names = ()  # with a matrix that is whole on every device (a pooler)
    core: Names = ()  # attention proper, beside the projection of queries
    attention_output: Names = ()  # what attention puts out, beside the core
    attention_residual: Names = ()  # the sum after attention, beside it
    mlp_residual: Names = ()  # the sum after the feed-forward, beside it, or beside attention
    rules: tuple[tuple[str, PartitionSpec], ...] = ()  # how odd arrays are split; see `shard`

    def of(self, *roles: str) -> Names:
        """The names of some roles."""
        return tuple(n for role in roles for n in getattr(self, role))

    def role_of(self, module: str) -> str | None:
        """The role of the module at this path; None where it has none."""
        return next((e.role for e in _entries((self,), module)), None)


class Entry(NamedTuple):
    """A name, its role, and the record that says so."""

    name: str
    role: str
    record: Roles


_NO_ROLES = ("name", "kind", "rules")
ROLES = tuple(f.name for f in dataclasses.fields(Roles) if f.name not in _NO_ROLES)
HOOKS = ("core", "attention_output", "attention_residual", "mlp_residual")

# Families are records of their files in `models/`; core knows them by the package's name alone.
FAMILIES: Registry[Any] = Registry("family", ("peft_jax.models",), "FAMILY", "peft_jax.families")
REGISTERED: Registry[Roles] = Registry("roles", (), "", "peft_jax.roles")
# What models that nobody described call their heads.
USUAL = Roles(name="usual", labels=("head", "logits", "unembed", "output_projection"))


def register_roles(roles: Roles) -> Roles:
    """Say what a model of one's own calls its modules: selection, sharding, placements and defaults
    of methods ask it then.

    Raises ValueError for a name that other roles have, and for one of a module with two roles.
    """
    by_name: dict[str, str] = {}
    for role in ROLES:
        for name in getattr(roles, role):
            if (other := by_name.setdefault(name, role)) != role:
                raise ValueError(f"roles {roles.name!r}: {name!r} is both {other} and {role}")
    known = REGISTERED.get(roles.name)
    return known if known and vars(known) == vars(roles) else REGISTERED.register(roles)


def roles_from(name: str, given: Mapping[str, Sequence[str]], **more: Any) -> Roles:
    """Roles out of plain data, role -> names. Raises ValueError for a role that there is none
    of.
    """
    for role in given:
        if role not in ROLES:
            raise ValueError(
                f"unknown role {role!r}.{nearest(role, ROLES)} There are {', '.join(ROLES)}"
            )
    return Roles(name=name, **{r: tuple(names) for r, names in given.items()}, **more)


def known_roles() -> tuple[Roles, ...]:
    """All records, the latest registered first, families after those."""
    families = (family.roles for family in FAMILIES.values())
    return tuple(dict.fromkeys([*[*REGISTERED.values()][::-1], *families, USUAL]))


def role_of(module: str) -> str | None:
    """The role of the module at this path in a model that calls it so; None where none does."""
    found = described(module)
    return None if found is None else found.role


def described(module: str) -> Entry | None:
    """The name that fits the module at this path, its role and whose it is."""
    return next(iter(_entries(known_roles(), module)), None)


def names_of(*roles: str) -> Names:
    """What the known models call the modules of some roles."""
    return tuple(dict.fromkeys(n for record in known_roles() for n in record.of(*roles)))


def is_expert(path: str) -> bool:
    """Whether the place at `path` holds the weights of stacked experts."""
    module, _, leaf = path.rpartition("/")
    return leaf in _expert_leaves(known_roles()) and role_of(module) == "experts"


def module_of(path: str) -> str:
    """The path that says what the weight at `path` does: its module's, of stacked experts its
    own.
    """
    return path if is_expert(path) else path.rpartition("/")[0]


def expert_leaves() -> Names:
    """What arrays of stacked experts are called, the ones nearest to the input first."""
    return _expert_leaves(known_roles())


def stack_names() -> Names:
    """What modules are called that hold layers."""
    return _stacks(known_roles())


class Found(NamedTuple):
    """The roles of a tree's modules by one record, with the names that are there."""

    roles: Roles
    names: Mapping[str, Names]

    def of(self, *roles: str) -> Names:
        """The names of some roles that are there."""
        return tuple(n for role in roles for n in self.names.get(role, ()))


def first_fit(modules: Iterable[str], choices: Sequence[Sequence[str]]) -> Found | None:
    """The first record, and its first choice of roles, all of which modules at these paths have;
    None where there is none.
    """
    modules = list(modules)
    for record in known_roles():
        there = _present(record, modules)
        for choice in choices:
            if all(there.get(role) for role in choice):
                return Found(record, {role: there[role] for role in choice})
    return None


def _present(record: Roles, modules: Sequence[str]) -> dict[str, Names]:
    """role -> its names that end the path of a module."""
    found: dict[str, dict[str, None]] = {}
    for module in modules:
        for entry in _entries((record,), module)[:1]:
            found.setdefault(entry.role, {})[entry.name] = None
    return {role: tuple(names) for role, names in found.items()}


def hooks_of(module: str, names: Iterable[str]) -> list[str]:
    """Modules without parameters in the module at this path, which has modules of these names."""
    found: dict[str, dict[str, None]] = {hook: {} for hook in HOOKS}
    records = known_roles()
    for name in names:
        answered: set[Roles] = set()
        for entry in _entries(records, f"{module}/{name}" if module else name):
            if entry.record in answered:
                continue
            answered.add(entry.record)
            for hook in HOOKS:
                if entry.role in _beside(entry.record, hook):
                    found[hook] |= dict.fromkeys(getattr(entry.record, hook))
    return list(dict.fromkeys(name for hook in HOOKS for name in found[hook]))


def modules_by_role(module: str, names: Iterable[str]) -> dict[str, str]:
    """role -> name of the modules of these names in the module at this path."""
    found = {name: role_of(f"{module}/{name}" if module else name) for name in names}
    return {role: name for name, role in found.items() if role is not None}


def _beside(record: Roles, hook: str) -> set[str]:
    """The roles of modules that a hook stands beside."""
    if hook in ("core", "attention_output"):
        return {"q", "qkv"}
    if hook == "attention_residual":
        return {"attention", "cross_attention"}
    return {"feed_forward"} if record.feed_forward else {"attention"}


@functools.lru_cache(maxsize=256)
def _table(records: tuple[Roles, ...]) -> dict[str, list[Entry]]:
    """last part of a name -> names that end so with their roles, the longest first."""
    table: dict[str, list[Entry]] = {}
    for record in records:
        for role in ROLES:
            for name in getattr(record, role):
                table.setdefault(name.rpartition("/")[2], []).append(Entry(name, role, record))
    return {last: sorted(found, key=lambda e: -len(e.name)) for last, found in table.items()}


def _entries(records: tuple[Roles, ...], module: str) -> list[Entry]:
    """What fits the module at this path, the longest name first."""
    found = _table(records).get(module.rpartition("/")[2], ())
    return [e for e in found if module == e.name or module.endswith(f"/{e.name}")]


@functools.lru_cache(maxsize=8)
def _expert_leaves(records: tuple[Roles, ...]) -> Names:
    with_experts = [r for r in records if r.experts]
    into = (n for r in with_experts for n in r.of("gate", "up", "gate_up"))
    return tuple(dict.fromkeys([*into, *(n for r in with_experts for n in r.down)]))


@functools.lru_cache(maxsize=8)
def _stacks(records: tuple[Roles, ...]) -> Names:
    return tuple(dict.fromkeys(n for r in records for n in r.stack))
