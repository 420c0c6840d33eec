"""The records of Hugging Face PEFT's methods: how each is stored, and our nodes from and to it.

Each method's record stands at the end of a file of its own in this package, as `FORMAT`; another
package offers its own as an entry point of the group `peft_jax.peft_formats`. PyTorch's weights are
[out, in], ours [in, out], so most factors are transposed.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from peft_jax.core.registry import Registry
from peft_jax.core.weight import Weight

WEIGHTS = "adapter_model.safetensors"
ROOT, PREFIX = "base_model.", "base_model.model."
Tensors = dict[str, np.ndarray]
Config = Mapping[str, Any]


class Module(NamedTuple):
    """What `read` knows of the module at hand: its Hugging Face name, its sizes, and what it is."""

    name: str
    n_in: int
    n_out: int
    embedding: bool


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PeftFormat:
    """How a method that PEFT stores module by module is stored; `name` is its `peft_type`.

    `tensors` are the names after the module's, `shared` those of the whole model; `options` the
    configuration's keys that are understood beyond `COMMON`. `write` gets the node of one layer as
    NumPy arrays; `read` gets the tensors of one module and returns a node's fields, each without
    leading axes. `describe` gives the configuration's keys for the nodes of an adapter, by module.
    `mirror` makes the node that does to the transposed weight what a node does to the weight, or
    None where no node does. `starts` are the values of the initialisation's option that leave the
    base as it is, beside True and False. `beside` are the options by which PEFT trains something
    beside the method, `without` the common options that the method's configuration lacks.
    """

    name: str
    nodes: tuple[type[Weight], ...]
    tensors: tuple[str, ...]
    write: Callable[[Any, bool], Tensors]
    read: Callable[[Tensors, Config, Module], tuple[type[Weight], dict[str, Any]]]
    describe: Callable[[Mapping[str, Any]], dict[str, Any]]
    options: frozenset[str] = frozenset()
    starts: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    shared: Mapping[str, Callable[[Any], np.ndarray]] = dataclasses.field(default_factory=dict)
    read_shared: (
        Callable[[Tensors, Config, tuple[int, int]], tuple[dict[str, Any], dict[str, Any]]] | None
    ) = None
    mirror: Callable[[Any], Any] | None = None

    def holds(self, node: Any) -> bool:
        """Whether a node is of this method; a subclass of its classes may compute anything."""
        return type(node) in self.nodes


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class WholeFormat:
    """How a method that PEFT stores for a model as a whole is stored; `name` is its `peft_type`.

    `write` makes (tensors, configuration) of the tree and the adapter's nodes, `read` puts the
    adapter of (tree, tensors, configuration, name) into the tree. `fits` says which of the nodes
    are this method's, `fit` whether (tree, nodes, name) are what it can say. `root` is what the
    names of tensors of other modules begin with.
    """

    name: str
    nodes: tuple[type, ...]
    write: Callable[[Any, Mapping[str, Any], str], tuple[Tensors, dict[str, Any]]]
    read: Callable[[Any, Tensors, Config, str], Any]
    fits: Callable[[Any], bool] | None = None
    fit: Callable[[Any, Mapping[str, Any], str], bool] | None = None
    root: str = ROOT

    def holds(self, node: Any) -> bool:
        """Whether a node is of this method; a subclass of its classes may compute anything."""
        return type(node) in self.nodes and (self.fits is None or self.fits(node))


# peft_type -> how the method is stored
PEFT_FORMATS: Registry[PeftFormat | WholeFormat] = Registry(
    "PEFT format", ("peft_jax.hub.peft",), "FORMAT", "peft_jax.peft_formats"
)


def module_formats() -> list[PeftFormat]:
    """The formats of methods that are stored module by module."""
    return [f for f in PEFT_FORMATS.values() if isinstance(f, PeftFormat)]


def whole_formats() -> list[WholeFormat]:
    """The formats of methods that are stored for a model as a whole."""
    return [f for f in PEFT_FORMATS.values() if isinstance(f, WholeFormat)]


def format_of(node: Any) -> PeftFormat | None:
    """The format that holds a node of one module; None where PEFT has none."""
    return next((f for f in module_formats() if f.holds(node)), None)


COMMON = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "revision",
        "target_modules",
        "task_type",
        "bias",
        "init_weights",
    ]
)


def pattern(config: Config, key: str, module: str, default: Any) -> Any:
    """PEFT's rule: a key of `config[key]` is a regular expression that matches the end of the
    module's name.
    """
    for expression, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({expression})$", module):
            return value
    return default


def number(config: Config, key: str) -> Any:
    """A required number. Raises ValueError where it is missing."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"adapter_config.json needs a number {key}, got {value!r}")
    return value


def usual(values: Iterable[Any]) -> Any:
    """The most frequent value."""
    return Counter(values).most_common(1)[0][0]


def exceptions(values: Mapping[str, Any], default: Any, *, whole: bool = True) -> dict[str, Any]:
    """A pattern for the modules whose value differs from the default.

    Some of PEFT's methods want something before the pattern's match; for them the name's first part
    is left out.
    """
    names = {module if whole else module.partition(".")[2]: v for module, v in values.items()}
    return {re.escape(name): v for name, v in names.items() if v != default}


def only(nodes: Mapping[str, Any], what: str, value: Callable[[Any], Any]) -> Any:
    """A value that all nodes share. Raises ValueError, since PEFT has one option for all."""
    found = {value(n) for n in nodes.values()}
    if len(found) > 1:
        raise ValueError(
            f"PEFT has one {what} for all modules; this adapter has {sorted(found, key=str)}"
        )
    return found.pop()


def check_rank(tensors: Tensors, config: Config, module: Module, name: str, axis: int) -> int:
    """The rank that the configuration gives the module, checked against a tensor."""
    r = pattern(config, "rank_pattern", module.name, number(config, "r"))
    if tensors[name].shape[axis] != r:
        raise ValueError(f"{module.name} has {name} {tensors[name].shape}, expected rank {r}")
    return r


def options(names: str) -> frozenset[str]:
    """The names in a text."""
    return frozenset(names.split())
