"""Binding: where a tree with nodes meets a Flax module, Linen or NNX."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import flax.linen
import flax.nnx

from peft_jax.core.bind import linen as _linen
from peft_jax.core.bind import nnx as _nnx
from peft_jax.core.bind.bound import Bound, Parts, capabilities
from peft_jax.core.bind.layout import layout_of
from peft_jax.core.bind.nnx import nnx_params
from peft_jax.core.bind.rules import MissingRuleError

__all__ = [
    "Bound",
    "MissingRuleError",
    "bind",
    "bound_of",
    "layout_of",
    "nnx_params",
    "register_rule",
]


def bind(model: Any, *, strict: bool = False) -> Bound:
    """A pure function `apply(params, *args, rng=None, method=None, adapter_ids=None,
    variables=None, **kwargs)` for any Flax model.

    `params` is the model's parameter tree with Weights and Attachments in it. Weights in the place
    of `kernel` or `embedding` are used without being materialised; `rng` (a key) switches dropout
    on, the nodes' and the model's; `method` names another method than `__call__`; `adapter_ids` [B]
    chooses each row's adapter out of a bank. A Weight in a module without a rule is materialised
    for each call and said so once; with `strict` it raises MissingRuleError. `apply.model` is the
    model, and further fields say what it can do (see `Bound`). Raises TypeError for no Flax module.

    What a model keeps beside its parameters (batch statistics, a cache) is given as `variables` and
    changes in what is returned alone. Linen: the other collections, {"batch_stats": ...}, and
    `mutable` as in Flax's own `apply`, which then returns (output, changed collections). NNX: an
    `nnx.State`, by default what the model holds when it is called; with `mutable` (True, or a
    filter as nnx.BatchStat) it returns (output, that state afterwards). A compiled function that is
    given `apply` as an argument sees what the model holds now, one that refers to it what the model
    held when it was traced. An NNX model's own dropout is on or off as its `train()` and `eval()`
    left it, and drawn anew where `rng` is given. `params` of an NNX model may be an `nnx.State`
    too; a parameter that they lack, and an attachment at what is never called, raise ValueError.
    """
    return _bound(model, strict, set(), {})


def _bound(model: Any, strict: bool, said: set[str], programs: dict[Hashable, Any]) -> Bound:
    """`bind` with what was said of weights without a rule, and what was compiled."""
    if isinstance(model, flax.linen.Module):
        split: Any = Parts(_linen.LinenRun(model.clone(), strict, said), None)
    elif isinstance(model, flax.nnx.Module):
        split = functools.partial(_nnx.split, model, strict, said)
    else:
        raise TypeError(f"bind needs a Flax Linen or NNX module, got {type(model).__name__}")
    return Bound(split=split, model=model, programs=programs, **capabilities(model))


# Of models that are called without having been bound, so that a second call finds what the first
# one compiled. Nothing in it refers to its model, and it goes when the model goes.
_KEPT: WeakKeyDictionary[Any, tuple[set[str], dict[Hashable, Any]]] = WeakKeyDictionary()


def bound_of(apply: Any) -> Bound:
    """`apply` as a `Bound`: itself, a Flax model, or any function of (params, tokens, ...)."""
    if isinstance(apply, Bound):
        return apply
    if not isinstance(apply, flax.linen.Module | flax.nnx.Module):
        return Bound.of(apply)
    try:
        kept = _KEPT.setdefault(apply, (set(), {}))
    except TypeError:  # a model with fields that have no hash
        kept = (set(), {})
    return _bound(apply, False, *kept)


def register_rule(
    module_class: type, rule: Callable[..., Any], *, method: str = "__call__"
) -> None:
    """How `module_class.method` uses its parameters when some of them are Weights.

    `rule(module, params, *args, **kwargs)` returns what the method would, where `params` maps the
    names of the module's own parameters to arrays or Weights; `peft_jax.matmul`, `take` and
    `einsum` accept both.
    """
    if issubclass(module_class, flax.linen.Module):
        _linen.register_rule(module_class, rule, method=method)
    elif issubclass(module_class, flax.nnx.Module):
        _nnx.register_rule(module_class, rule, method=method)
    else:
        raise TypeError(
            f"register_rule needs a Flax Linen or NNX module class, got {module_class.__name__}"
        )
