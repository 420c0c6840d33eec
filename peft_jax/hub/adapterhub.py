"""AdapterHub's folders (`adapters` 1.x: `adapter_config.json`, `adapter.safetensors`) of decoders,
in and out.

Bottleneck adapters (Houlsby's, Pfeiffer's, parallel ones, Compacter, invertible ones), prefix
tuning, LoRA and ReFT. The library itself writes a PyTorch pickle unless told
`use_safetensors=True`; pickles are not read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.adapters.bottleneck import ACTIVATIONS, Bottleneck
from peft_jax.adapters.compacter import Compacter
from peft_jax.adapters.invertible import Invertible, place_invertible
from peft_jax.adapters.prefix import Prefix
from peft_jax.adapters.reft import ReFT
from peft_jax.core.attachment import Shared
from peft_jax.core.placing import hidden_size, layers_of, modules_with_roles
from peft_jax.core.roles import role_of
from peft_jax.core.select import nearest
from peft_jax.hub.layers import join_layers, put_nodes, split_layers
from peft_jax.hub.peft import attach_peft
from peft_jax.hub.peft.prefix_tuning import FORMAT as PREFIX_TUNING
from peft_jax.hub.peft.prefix_tuning import place_prefix, prefix_places
from peft_jax.hub.safetensors_io import CONFIG, open_checkpoint, write_adapter
from peft_jax.low_rank.lora import LoRA

WEIGHTS = "adapter.safetensors"
Tensors = dict[str, np.ndarray]
Config = Mapping[str, Any]

# Options of BnConfig that have to have these values, for want of a counterpart.
_FIXED: dict[str, Any] = {
    "cross_adapter": False,
    "shared_W_phm": False,
    "factorized_phm_rule": False,
    "phm_bias": True,
    "learn_phm": True,
}


def load_adapterhub(params: Any, path: Path, config: Config, name: str) -> Any:
    """`params` with the adapter of an AdapterHub folder. Raises ValueError naming the option or
    tensor that cannot be used.
    """
    if not (path / WEIGHTS).is_file():
        raise ValueError(
            f"{path} has no {WEIGHTS}; save the adapter with use_safetensors=True (pickles are "
            "not read)"
        )
    width = hidden_size(params)
    if config.get("hidden_size") not in (None, width):
        raise ValueError(
            f"the adapter in {path} is for a model of {config['hidden_size']} features; this one "
            f"has {width}"
        )
    with open_checkpoint(path, WEIGHTS, WEIGHTS + ".index.json") as checkpoint:
        tensors = {n: checkpoint.read(n).astype(np.float32) for n in checkpoint.names}
    theirs, options = str(config.get("name", name)), config["config"]
    kind = options.get("architecture")
    readers = {
        None: _read_bottleneck,
        "prefix_tuning": _read_prefix,
        "lora": _read_lora,
        "reft": _read_reft,
    }
    if kind not in readers:
        known = ", ".join(k or "bottleneck" for k in readers)
        raise ValueError(
            f"{path / CONFIG}: architecture {kind!r} is not supported; supported: {known}"
        )
    try:
        return readers[kind](params, tensors, options, name, theirs)
    except KeyError as error:
        raise ValueError(
            f"{path / WEIGHTS} lacks a tensor {error} that the adapter needs"
        ) from error


def _parse(tensors: Tensors, marker: str) -> dict[str, Tensors]:
    """Hugging Face module name -> {what follows `marker`: tensor}; all tensors must have the
    marker.
    """
    found: dict[str, Tensors] = {}
    for key, value in tensors.items():
        module, _, rest = key.partition(marker)
        if not rest:
            raise ValueError(
                f"tensor {key} does not belong to the adapter's method ({marker.strip('.')})"
            )
        found.setdefault(module, {})[rest] = value
    return found


# ------------------------------------------------------------------------------------------------
# bottleneck adapters


def _read_bottleneck(params: Any, tensors: Tensors, options: Config, name: str, theirs: str) -> Any:
    for key, value in _FIXED.items():
        if options.get(key, value) != value:
            raise ValueError(f"option {key}={options[key]!r} of the adapter is not supported")
    shared = {k: tensors.pop(k) for k in list(tensors) if ".shared_parameters." in k}
    coupling = {
        k.rpartition(f".invertible_adapters.{theirs}.")[2]: tensors.pop(k)
        for k in list(tensors)
        if ".invertible_" in k
    }
    nodes = {}
    for module, arrays in _parse(tensors, f".adapters.{theirs}.").items():
        layer, _, place = module.rpartition(".")
        if place not in _RESIDUALS:
            raise ValueError(f"tensor group {module} has no counterpart in this model")
        node = _bottleneck(arrays, options, name, f"compacter_{name}" if shared else "")
        kind = "compacter" if isinstance(node, Compacter) else "bottleneck"
        inside = _in_layer(params, _role(options, _RESIDUALS[place]))
        nodes[f"{layer.replace('.', '/')}/{inside}/{kind}"] = node
    params = put_nodes(params, join_layers(params, nodes, name))
    if shared:
        rule = jnp.asarray(next(iter(shared.values())))
        params = {**params, f"shared_compacter_{name}": Shared(trained={"rule": rule}, fixed={})}
    if coupling:
        params = place_invertible(params, _coupling(coupling, options, name), None)
    return params


def _role(options: Config, where: str) -> str:
    """The role of the module of a layer that the adapter stands beside, by how its residuals
    lie.
    """
    if options.get("is_parallel") or (
        options.get("original_ln_before") and options.get("residual_before_ln", True) is True
    ):
        if not options.get("original_ln_after", True):
            raise ValueError(
                "original_ln_after=False without the residual of the stream is not supported"
            )
        return where
    if options.get("original_ln_before"):
        if options.get("original_ln_after", True):
            raise ValueError(
                "original_ln_before, original_ln_after and residual_before_ln=False add the "
                "residual twice; not supported"
            )
        return where
    if not options.get("original_ln_after", True):
        raise ValueError(
            "original_ln_before=False with original_ln_after=False drops the residual; not "
            "supported"
        )
    return {"attention_residual": "o", "mlp_residual": "down"}[where]


def _in_layer(params: Any, role: str) -> str:
    """The path of the module of this role from its layer on."""
    path = modules_with_roles(params)[role][0]
    return _layered(layers_of(params, path)[1][0][0])[1]


def _layered(module: str) -> tuple[str, str]:
    """(path of the layer, path from there on) of a module whose path has its layer's number."""
    parts = module.split("/")
    at = next((i for i, part in enumerate(parts, 1) if part.isdigit()), 0)
    return "/".join(parts[:at]), "/".join(parts[at:])


def _bottleneck(arrays: Tensors, options: Config, name: str, group: str) -> Any:
    activation = str(options["non_linearity"]).lower()
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown non_linearity {activation!r}.{nearest(activation, ACTIVATIONS)}")
    scaling = options.get("scaling", 1.0)
    stream = bool(options.get("is_parallel") or options.get("original_ln_before"))
    common: dict[str, Any] = {
        "name": name,
        "activation": activation,
        "scaling": float(scaling) if isinstance(scaling, int | float) else 1.0,
        "parallel": bool(options.get("is_parallel")),
        "dropout": float(options.get("dropout") or 0.0),
    }
    at = 1 if options.get("ln_before") else 0
    held = cast("dict[str, jax.Array]", arrays)  # on the host until the layers are joined
    if options.get("phm_layer"):
        unsupported = [k for k in ("ln_before", "ln_after", "use_gating") if options.get(k)]
        if unsupported or not isinstance(scaling, int | float):
            raise ValueError(
                f"phm_layer beside {unsupported or ['a learned scaling']} is not supported"
            )
        down, up = (_factors(arrays, p) for p in (f"adapter_down.{at}.", "adapter_up."))
        return Compacter(
            **common,
            down=down,
            down_bias=held[f"adapter_down.{at}.b"],
            up=up,
            up_bias=held["adapter_up.b"],
            group=group,
        )

    def norm(part):
        return (held[f"{part}.weight"], held[f"{part}.bias"])

    gating: dict[str, Any] = {}
    if options.get("use_gating"):
        gating = {
            "gating": "sequence",
            "gating_weight": held["gate.weight"].T,
            "gating_bias": held["gate.bias"],
        }
    return Bottleneck(
        **common,
        down=held[f"adapter_down.{at}.weight"].T,
        down_bias=held[f"adapter_down.{at}.bias"],
        up=held["adapter_up.weight"].T,
        up_bias=held["adapter_up.bias"],
        scale=held["scaling"] if scaling in ("learned", "channel") else None,
        before=norm(
            "adapter_norm_before" if "adapter_norm_before.weight" in arrays else "adapter_down.0"
        )
        if at
        else None,
        after=norm("adapter_norm_after") if options.get("ln_after") else None,
        residual_first=bool(options.get("adapter_residual_before_ln")),
        stream=stream and options.get("residual_before_ln", True) is True,
        **gating,
    )


def _factors(arrays: Tensors, part: str) -> dict[str, np.ndarray]:
    if f"{part}W" in arrays:  # not factorized: the other factor is the identity
        n, _, out = arrays[f"{part}W"].shape
        factors = {
            "left": arrays[f"{part}W"],
            "right": np.tile(np.eye(out, dtype=np.float32), (n, 1, 1)),
        }
    else:
        factors = {"left": arrays[f"{part}W_left"], "right": arrays[f"{part}W_right"]}
    return factors | ({"rule": arrays[f"{part}phm_rule"]} if f"{part}phm_rule" in arrays else {})


def _coupling(arrays: Tensors, options: Config, name: str) -> Invertible:
    if options.get("inv_adapter") != "nice":
        raise ValueError(f"inv_adapter={options.get('inv_adapter')!r} is not supported; nice is")

    def net(part):
        return tuple(
            (jnp.asarray(arrays[f"{part}.{i}.weight"].T), jnp.asarray(arrays[f"{part}.{i}.bias"]))
            for i in (0, 2)
        )

    return Invertible(
        first=net("F"), second=net("G"), activation=str(options["non_linearity"]).lower(), name=name
    )


# -------------------------------------------------------------------------------------------
# prefixes, LoRA and ReFT


def _read_prefix(params: Any, tensors: Tensors, options: Config, name: str, theirs: str) -> Any:
    if options.get("use_gating"):
        raise ValueError(
            "a gated prefix of AdapterHub weighs a sequence by its mean; not supported"
        )
    parts = {k.rpartition(".self_prefix.")[2]: v for k, v in tensors.items()}
    order, length = prefix_places(params), int(options["prefix_length"])
    if options.get("flat"):
        return place_prefix(
            params, parts["control_trans"].reshape(length, -1), order, name, offset=False
        )
    h = parts["wte.weight"] @ parts["control_trans.0.weight"].T + parts["control_trans.0.bias"]
    h = np.asarray(ACTIVATIONS[str(options["non_linearity"]).lower()](jnp.asarray(h)))
    return place_prefix(
        params,
        h @ parts["control_trans.2.weight"].T + parts["control_trans.2.bias"],
        order,
        name,
        offset=False,
    )


def _read_lora(params: Any, tensors: Tensors, options: Config, name: str, theirs: str) -> Any:
    if options.get("composition_mode", "add") != "add" or options.get("use_gating"):
        raise ValueError(
            "only LoRA with composition_mode='add' and without gating is read from "
            "AdapterHub's folders"
        )
    names = {key: key.replace(f".loras.{theirs}.", ".") + ".weight" for key in tensors}
    config = {"peft_type": "LORA", "r": int(options["r"]), "lora_alpha": float(options["alpha"])}
    config["lora_dropout"] = float(options.get("dropout") or 0.0)
    return attach_peft(
        params,
        {f"base_model.model.{names[k]}": v for k, v in tensors.items()},
        config,
        name,
        Path(WEIGHTS),
    )


def _read_reft(params: Any, tensors: Tensors, options: Config, name: str, theirs: str) -> Any:
    nodes = {}
    ends = [int(options.get(k) or 0) for k in ("prefix_positions", "suffix_positions")]
    tied = bool(options.get("tied_weights"))
    for module, arrays in _parse(tensors, f".reft_layer.refts.{theirs}.units.").items():
        for unit in (0,) if tied else (0, 1):
            own = {
                k.removeprefix(f"{unit}."): v for k, v in arrays.items() if k.startswith(f"{unit}.")
            }
            orthogonal = "projection.weight" not in own
            weights: dict[str, Any] = {
                "projection": _householder(own) if orthogonal else own["projection.weight"].T,
                "source": own["learned_source.weight"].T,
                "source_bias": own["learned_source.bias"],
            }
            nodes[f"{module.replace('.', '/')}/reft{unit or ''}"] = ReFT(
                **weights,
                orthogonal=orthogonal,
                subtract=bool(options.get("subtract_projection", True)),
                activation=str(options.get("non_linearity") or "linear").lower(),
                first=ends[0] if tied or unit == 0 else 0,
                last=ends[1] if tied or unit == 1 else 0,
                name=name,
            )
    return put_nodes(params, join_layers(params, nodes, name))


def _householder(arrays: Tensors) -> np.ndarray:
    """[D, r] of PyTorch's orthogonal parametrisation of a wide matrix: a product of Householder
    reflections, times its base.
    """
    part = "projection.parametrizations.weight"
    x = arrays[f"{part}.original"].T.astype(np.float64)
    a = np.tril(x, -1)
    q = np.eye(*x.shape)
    for i in reversed(range(x.shape[1])):
        v = a[:, i] + np.eye(len(a))[i]
        q = q - 2.0 / (v @ v) * np.outer(v, v @ q)
    q = q * np.sign(np.diagonal(x).astype(int))
    return (arrays[f"{part}.0.base"] @ q if f"{part}.0.base" in arrays else q).astype(np.float32)


# --------------------------------------------------------------------------------------------------
# saving

_PLACES = {  # by the role of what an adapter stands beside
    "o": "attention_adapters",
    "attention_residual": "attention_adapters",
    "down": "output_adapters",
    "mlp_residual": "output_adapters",
}


_RESIDUALS = {"attention_adapters": "attention_residual", "output_adapters": "mlp_residual"}


def save_adapterhub(
    folder: str | os.PathLike[str],
    params: Any,
    nodes: Mapping[str, Any],
    *,
    name: str,
    base: str | None,
) -> None:
    """Write bottleneck adapters, a prefix or LoRAs as an AdapterHub folder. Raises ValueError for
    what it cannot say.
    """
    kinds = {type(n) for n in nodes.values()}
    if kinds == {Bottleneck}:
        tensors, options = _write_bottleneck(split_layers(params, nodes, name), name)
    elif kinds == {Prefix}:
        tensors, options = _write_prefix(params, nodes, name)
    elif kinds == {LoRA}:
        tensors, options = _write_lora(split_layers(params, nodes, name), name)
    else:
        raise ValueError(
            "AdapterHub's format is written for Bottleneck, Prefix or LoRA alone, not "
            f"{sorted(k.__name__ for k in kinds)}"
        )
    config = {
        "config": options,
        "hidden_size": hidden_size(params),
        "model_name": base,
        "name": name,
        "version": "adapters.1.3.0",
    }
    write_adapter(folder, WEIGHTS, tensors, config)


def _write_bottleneck(split: Mapping[str, Any], name: str) -> tuple[Tensors, dict[str, Any]]:
    tensors: Tensors = {}
    roles = {p: role_of(p.rpartition("/")[0]) for p in split}
    found = set(roles.values())
    if len({r in ("o", "down") for r in found}) > 1 or not found <= set(_PLACES):
        modules = {p.rpartition("/")[0].rpartition("/")[2] for p in split}
        raise ValueError(
            "AdapterHub places adapters after attention and feed-forward, not at "
            f"{', '.join(sorted(modules))}"
        )
    first = next(iter(split.values()))
    for path, n in split.items():
        if _options_of(n) != _options_of(first):
            raise ValueError(f"AdapterHub's adapters share their options; {path} has others")
        if n.gating == "token" or n.down_bias is None or n.up_bias is None:
            raise ValueError(
                f"{path} has a gate for each token or no biases, which AdapterHub's format "
                "cannot say"
            )
        layer, at = _layered(path)[0].replace("/", "."), 0 if n.before is None else 1
        own = f"{layer}.{_PLACES[str(roles[path])]}.adapters.{name}."
        arrays = {f"adapter_down.{at}.weight": n.down.T, f"adapter_down.{at}.bias": n.down_bias}
        arrays |= {"adapter_up.weight": n.up.T, "adapter_up.bias": n.up_bias}
        for part, norm in (
            ("adapter_norm_before", n.before),
            ("adapter_down.0", n.before),
            ("adapter_norm_after", n.after),
        ):
            arrays |= {} if norm is None else {f"{part}.weight": norm[0], f"{part}.bias": norm[1]}
        arrays |= {} if n.scale is None else {"scaling": n.scale}
        arrays |= (
            {}
            if n.gating == "none"
            else {"gate.weight": n.gating_weight.T, "gate.bias": n.gating_bias}
        )
        tensors |= {own + k: np.ascontiguousarray(v) for k, v in arrays.items()}
    layers = {_layered(p)[0] for p in split}
    places = {_PLACES[str(role)] for role in found}
    if len(split) != len(layers) * len(places):
        raise ValueError(
            "AdapterHub has adapters at the same places of each layer, and this adapter has not"
        )
    before = found <= set(_RESIDUALS.values()) and not first.parallel
    return tensors, _options_of(first) | {
        "mh_adapter": "attention_adapters" in places,
        "output_adapter": "output_adapters" in places,
        "original_ln_before": before,
        "original_ln_after": True,
        "residual_before_ln": True,
        "leave_out": [],
        "reduction_factor": first.up.shape[1] / first.up.shape[0],
    }


def _options_of(n: Bottleneck) -> dict[str, Any]:
    learned = None if n.scale is None else "learned" if np.shape(n.scale)[-1] == 1 else "channel"
    return {
        "adapter_residual_before_ln": n.residual_first,
        "dropout": n.dropout,
        "is_parallel": n.parallel,
        "ln_after": n.after is not None,
        "ln_before": n.before is not None,
        "non_linearity": "swish" if n.activation == "silu" else n.activation,
        "scaling": learned or n.scaling,
        "use_gating": n.gating == "sequence",
    }


def _write_prefix(
    params: Any, nodes: Mapping[str, Any], name: str
) -> tuple[Tensors, dict[str, Any]]:
    prompt = PREFIX_TUNING.write(params, nodes, name)[0]["prompt_embeddings"]
    own = f"prefix_tuning.pool.prefix_tunings.{name}.self_prefix.control_trans"
    attention = prefix_places(params)[0][0].rpartition("/")[0].replace("/", ".")
    options = {
        "architecture": "prefix_tuning",
        "flat": True,
        "prefix_length": len(prompt),
        "cross_prefix": False,
    }
    return {f"{attention}.{own}": prompt.reshape(-1)}, options


def _write_lora(split: Mapping[str, Any], name: str) -> tuple[Tensors, dict[str, Any]]:
    alphas = {(n.rank, round(float(n.scale) * n.rank, 6)) for n in split.values()}
    if len(alphas) > 1:
        raise ValueError(
            f"AdapterHub's LoRA has one rank and alpha for all modules, this one {sorted(alphas)}"
        )
    rank, alpha = alphas.pop()
    roles = {p.removesuffix("/kernel"): role_of(p.removesuffix("/kernel")) for p in split}
    if others := [p for p, role in roles.items() if role not in ("q", "k", "v")]:
        raise ValueError(
            "AdapterHub's LoRA adapts a decoder's projections of queries, keys and values, not "
            f"{others[0].rpartition('/')[2]}"
        )
    tensors: Tensors = {}
    for path, n in split.items():
        own = f"{path.removesuffix('/kernel').replace('/', '.')}.loras.{name}."
        a, b = n.factors()
        tensors |= {own + "lora_A": np.asarray(a).T.copy(), own + "lora_B": np.asarray(b).T.copy()}
    options = {
        "architecture": "lora",
        "r": rank,
        "alpha": alpha,
        "attn_matrices": sorted(str(role) for role in set(roles.values())),
    }
    return tensors, options | {
        "composition_mode": "add",
        "selfattn_lora": True,
        "intermediate_lora": False,
        "output_lora": False,
    }
