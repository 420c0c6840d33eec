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
    """A pure function `apply(params, *args, rng=None, method=None, adapter_ids=None, **kwargs)` for any Flax model.

    `params` is the model's parameter tree with Weights and Attachments in it. Weights in the place of `kernel` or
    `embedding` are used without being materialised; `rng` (a key) switches dropout on, the nodes' and the model's;
    `method` names another method than `__call__`; `adapter_ids` [B] chooses each row's adapter out of a bank. A Weight
    in a module without a rule is materialised for each call and said so once; with `strict` it raises MissingRuleError.
    `apply.model` is the model. Raises TypeError for no Flax module.
    """
    if isinstance(model, flax.linen.Module):
        return _linen.bind_linen(model, strict=strict)
    if isinstance(model, flax.nnx.Module):
        return _nnx.bind_nnx(model, strict=strict)
    raise TypeError(f"bind needs a Flax Linen or NNX module, got {type(model).__name__}")


def register_rule(module_class: type, rule: Callable[..., Any], *, method: str = "__call__") -> None:
    """How `module_class.method` uses its parameters when some of them are Weights.

    `rule(module, params, *args, **kwargs)` returns what the method would, where `params` maps the names of the module's
    own parameters to arrays or Weights; `peft_jax.matmul`, `take` and `einsum` accept both.
    """
    if issubclass(module_class, flax.linen.Module):
        _linen.register_rule(module_class, rule, method=method)
    elif issubclass(module_class, flax.nnx.Module):
        _nnx.register_rule(module_class, rule, method=method)
    else:
        raise TypeError(f"register_rule needs a Flax Linen or NNX module class, got {module_class.__name__}")
