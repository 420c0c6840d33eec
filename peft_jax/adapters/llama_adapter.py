"""LLaMA-Adapter (Zhang et al. 2023, arXiv:2303.16199): prompts in the upper layers' attention,
behind a gate that starts at zero.

The prompt is projected by the layer's own projections of keys and values, gets a softmax of its
own, and its part is added to attention's output times the gate (equations 4 to 7; one gate for all
heads, as in PEFT).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self, Unpack

import jax
import jax.numpy as jnp

from peft_jax.adapters.adapter import per_row
from peft_jax.core.attachment import Attachment, module_at
from peft_jax.core.bind.rules import bias_of, linear
from peft_jax.core.method import Method
from peft_jax.core.placing import find_modules, hidden_size, module_paths, place_attachments
from peft_jax.core.reparametrised import node
from peft_jax.core.roles import first_fit, modules_by_role
from peft_jax.core.weight import static
from peft_jax.core.where import Named, Selection
from peft_jax.models.operands import AttentionOperands


@node
class AdaptionPrompt(Attachment):
    """prompt [*lead, P, D] and strength [*lead] at an attention core; `keys` and `values` [*lead,
    P, K d] are made by `linked`.
    """

    trainable: ClassVar[tuple[str, ...]] = ("prompt", "strength")
    prompt: jax.Array
    strength: jax.Array
    gate: jax.Array | None = None
    keys: jax.Array | None = None
    values: jax.Array | None = None
    name: str = static(default="default")
    frozen: bool = static(default=False)

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading axes."""
        return self.strength.shape

    def linked(self, params: Any, path: str) -> Self:
        attention, names = _attention(params, path)

        def project(role):
            return _projected(self.prompt, attention[names[role]], len(self.lead))

        return self.replace(keys=project("k"), values=project("v"))

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        o: AttentionOperands = args[0]
        return self.added(call(o), o.query, o.key.shape[-2])

    def added(self, out: jax.Array, q: jax.Array, kv_heads: int) -> jax.Array:
        """`out` [B, T, H, d] with the prompt's part for the queries q [B, T, H, d]."""
        assert self.keys is not None  # `linked` made them
        assert self.values is not None
        B, T, H, d = q.shape

        def heads(x):
            return x.reshape(*x.shape[:-1], kv_heads, d).astype(q.dtype)

        keys, values = heads(self.keys), heads(self.values)  # [P, K, d], or [B, P, K, d] in a bank
        grouped = q.reshape(B, T, kv_heads, -1, d)
        rows = "b" if keys.ndim == 4 else ""
        scores = (
            jnp.einsum(f"btkgd,{rows}pkd->bkgtp", grouped, keys, preferred_element_type=jnp.float32)
            * d**-0.5
        )
        weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
        more = jnp.einsum(f"bkgtp,{rows}pkd->btkgd", weights, values).reshape(B, T, H, d)
        strength = self.strength if self.gate is None else self.strength * self.gate
        return (
            out + per_row(strength.astype(q.dtype))[..., None] * more
            if strength.ndim
            else out + strength.astype(q.dtype) * more
        )


@node
class FusedAdaptionPrompt(AdaptionPrompt):
    """The same for attention with one projection for queries, keys and values (GPT-2's).

    As in PEFT, the prompt's part is added to what attention puts out, after its output projection.
    """

    def linked(self, params: Any, path: str) -> Self:
        attention, names = _attention(params, path)
        all_three = _projected(self.prompt, attention[names["qkv"]], len(self.lead))
        _, keys, values = jnp.split(all_three, 3, axis=-1)
        return self.replace(keys=keys, values=values)

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        _, q = args
        out = call(*args, **kwargs)
        return self.added(out.reshape(q.shape), q, q.shape[-2]).reshape(out.shape)


def _attention(params: Any, path: str) -> tuple[Any, dict[str, str]]:
    """(attention, its modules' names by role) of the node at `path`, which is beside its core or
    output.
    """
    outer = "/".join(path.split("/")[:-2])
    attention = module_at(params, outer)
    return attention, modules_by_role(outer, attention)


def _projected(prompt: jax.Array, layer: Any, leading: int) -> jax.Array:
    """The prompt [*lead, P, D] through a dense layer of the tree."""

    def run(x, layer) -> jax.Array:
        return linear(x, layer["kernel"], bias_of(layer), dtype=None, precision=None)

    for _ in range(leading):
        run = jax.vmap(run)
    return run(prompt, {k: layer[k] for k in ("kernel", "bias") if k in layer})


def prompted(params: Any) -> tuple[type[AdaptionPrompt], str]:
    """(kind of prompt, name of the module in a decoder's attention that it stands beside). Raises
    ValueError for models without such attention.
    """
    found = first_fit(module_paths(params), (("core", "k", "v"), ("attention_output", "qkv")))
    if found is None or found.roles.kind != "decoder":
        raise ValueError(
            "adaption_prompt needs a decoder's attention with projections of keys and values, or "
            "one for all three and its output as a module, and this model has none"
        )
    fused = "qkv" in found.names
    cls = FusedAdaptionPrompt if fused else AdaptionPrompt
    return cls, found.of("attention_output" if fused else "core")[0]


def adaption_prompt(
    params: Any,
    key: jax.Array,
    *,
    adapter_len: int = 10,
    adapter_layers: int | None = None,
    layers: Sequence[int] | None = None,
    **where: Unpack[Named],
) -> Any:
    """`params` with a prompt of `adapter_len` tokens in the attention of the last `adapter_layers`
    layers (all but the first two by default, one at least), or of `layers`.

    Raises ValueError for a model that is no decoder with projections of keys and values, or GPT-2's
    one for all three (PEFT has none for others either).
    """
    adapter = Selection.of(adaption_prompt, where).adapter
    if adapter_len < 1:
        raise ValueError(f"adapter_len must be at least 1, got {adapter_len}")
    cls, place = prompted(params)
    known = find_modules(params, place)
    count = 1 + max(i for m in known for i in m.numbers)
    if layers is None:
        wanted = max(1, count - 2) if adapter_layers is None else adapter_layers
        if not 1 <= wanted <= count:
            raise ValueError(
                f"adapter_layers must lie between 1 and the {count} layers, got {wanted}"
            )
        layers = range(count - wanted, count)
    D = hidden_size(params)

    def make(m: Any, key: jax.Array) -> AdaptionPrompt:
        prompt = jax.random.normal(key, (*m.lead, adapter_len, D))
        return cls(prompt=prompt, strength=jnp.zeros(m.lead), gate=m.gate, name=adapter)

    modules = find_modules(params, place, layers=layers)
    return place_attachments(params, key, make, "adaption", adapter, modules)


METHOD = Method(
    name="adaption_prompt",
    function=adaption_prompt,
    nodes=(AdaptionPrompt, FusedAdaptionPrompt),
    at="attention",
    title="LLaMA-Adapter",
    follows=(
        "LLaMA-Adapter, Zhang et al. 2023, arXiv:2303.16199, equations 4 to 7; PEFT "
        "`AdaptionPromptConfig`"
    ),
    differs="One gate for all heads, as in PEFT",
    anywhere=False,
    example={"adapter_len": 3, "adapter_layers": 2},
)
