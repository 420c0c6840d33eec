"""Binding: where a tree with nodes meets a Flax module, Linen or NNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen
import flax.nnx

from peft_jax.core.bind import linen as _linen
from peft_jax.core.bind import nnx as _nnx
from peft_jax.core.bind.layout import layout_of
from peft_jax.core.bind.nnx import nnx_params
from peft_jax.core.bind.rules import MissingRuleError

__all__ = ["MissingRuleError", "bind", "layout_of", "nnx_params", "register_rule"]


def bind(model: Any, *, strict: bool = False) -> Callable[..., Any]:
    """A pure function `apply(params, *args, rng=None, method=None, adapter_ids=None,
    variables=None, **kwargs)` for any Flax model.

    `params` is the model's parameter tree with Weights and Attachments in it. Weights in the place
    of `kernel` or `embedding` are used without being materialised; `rng` (a key) switches dropout
    on, the nodes' and the model's; `method` names another method than `__call__`; `adapter_ids` [B]
    chooses each row's adapter out of a bank. A Weight in a module without a rule is materialised
    for each call and said so once; with `strict` it raises MissingRuleError. `apply.model` is the
    model. Raises TypeError for no Flax module.

    What a model keeps beside its parameters (batch statistics, a cache) is given as `variables` and
    changes in what is returned alone. Linen: the other collections, {"batch_stats": ...}, and
    `mutable` as in Flax's own `apply`, which then returns (output, changed collections). NNX: an
    `nnx.State`, by default what the model held when it was bound; with `mutable` (True, or a filter
    as nnx.BatchStat) it returns (output, that state afterwards). An NNX model's own dropout is on
    or off as its `train()` and `eval()` left it, and drawn anew where `rng` is given. `params` of
    an NNX model may be an `nnx.State` too; a parameter that they lack, and an attachment at what is
    never called, raise ValueError.
    """
    if isinstance(model, flax.linen.Module):
        return _linen.bind_linen(model, strict=strict)
    if isinstance(model, flax.nnx.Module):
        return _nnx.bind_nnx(model, strict=strict)
    raise TypeError(f"bind needs a Flax Linen or NNX module, got {type(model).__name__}")


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
