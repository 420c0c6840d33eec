"""One `Format` for each method that Hugging Face PEFT has: its tensors and options, and our nodes
from and to them.

PyTorch's weights are [out, in], ours [in, out], so most factors are transposed. `write` gets the
node of one layer as NumPy arrays; `read` gets the tensors of one module and returns a node's
fields, each without leading axes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from peft_jax.adapters.ia3 import IA3
from peft_jax.core.sharding import fetch
from peft_jax.core.weight import Weight
from peft_jax.low_rank.adalora import AdaLoRA
from peft_jax.low_rank.boft import BOFT
from peft_jax.low_rank.c3a import C3A
from peft_jax.low_rank.delora import DeLoRA
from peft_jax.low_rank.dora import DoRA
from peft_jax.low_rank.fourierft import FourierFT
from peft_jax.low_rank.gralora import GraLoRA
from peft_jax.low_rank.hira import HiRA
from peft_jax.low_rank.hra import HRA
from peft_jax.low_rank.loha import LoHa
from peft_jax.low_rank.lokr import LoKr
from peft_jax.low_rank.lora import LoRA, scaling
from peft_jax.low_rank.miss import BatMiSS, MiSS
from peft_jax.low_rank.oft import OFT
from peft_jax.low_rank.randlora import RandLoRA
from peft_jax.low_rank.road import RoAd
from peft_jax.low_rank.shira import SHiRA
from peft_jax.low_rank.torch_random import Generator
from peft_jax.low_rank.trainable_tokens import TrainableTokens
from peft_jax.low_rank.vblora import VBLoRA
from peft_jax.low_rank.vera import VeRA, projections
from peft_jax.low_rank.waveft import WaveFT
from peft_jax.quantization.qalora import QALoRA

Tensors = dict[str, np.ndarray]
Config = Mapping[str, Any]


class Module(NamedTuple):
    """What `read` knows of the module at hand: its Hugging Face name, its sizes, and what it is."""

    name: str
    n_in: int
    n_out: int
    embedding: bool


class Format(NamedTuple):
    """How one of PEFT's methods is stored.

    `tensors` are the names after the module's, `shared` those of the whole model; `options` the
    configuration's keys that are understood beyond `COMMON`. `describe` gives those keys for the
    nodes of an adapter, by module. `mirror` makes the node that does to the transposed weight what
    a node does to the weight, or None where no node does.
    """

    nodes: tuple[type[Weight], ...]
    tensors: tuple[str, ...]
    write: Callable[[Any, bool], Tensors]
    read: Callable[[Tensors, Config, Module], tuple[type[Weight], dict[str, Any]]]
    describe: Callable[[Mapping[str, Any]], dict[str, Any]]
    options: frozenset[str] = frozenset()
    shared: Mapping[str, Callable[[Any], np.ndarray]] = {}  # name -> from the Shared node
    read_shared: (
        Callable[[Tensors, Config, tuple[int, int]], tuple[dict[str, Any], dict[str, Any]]] | None
    ) = None
    mirror: Callable[[Any], Any] | None = None


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


def _one(nodes: Mapping[str, Any], what: str, value: Callable[[Any], Any]) -> Any:
    """A value that all nodes share. Raises ValueError, since PEFT has one option for all."""
    found = {value(n) for n in nodes.values()}
    if len(found) > 1:
        raise ValueError(
            f"PEFT has one {what} for all modules; this adapter has {sorted(found, key=str)}"
        )
    return found.pop()


def _by_rank(tensors: Tensors, config: Config, module: Module, name: str, axis: int) -> int:
    """The rank that the configuration gives the module, checked against a tensor."""
    r = pattern(config, "rank_pattern", module.name, number(config, "r"))
    if tensors[name].shape[axis] != r:
        raise ValueError(f"{module.name} has {name} {tensors[name].shape}, expected rank {r}")
    return r


# --------------------------------------------------------------------------------------------------
# LoRA


def _write_lora(node: LoRA, embedding: bool) -> Tensors:
    a, b = (np.asarray(f) for f in node.factors())
    used = a.any(axis=0) | b.any(axis=1)  # columns padded to a common rank are zero in both
    used = used if used.any() else np.ones_like(used)
    names = (
        ("lora_embedding_A", "lora_embedding_B")
        if embedding
        else ("lora_A.weight", "lora_B.weight")
    )
    tensors = {names[0]: a[:, used].T, names[1]: b[used].T}
    if isinstance(node, DoRA):
        tensors["lora_magnitude_vector"] = np.asarray(node.magnitude)
    return tensors


def _read_lora(
    tensors: Tensors, config: Config, module: Module
) -> tuple[type[Weight], dict[str, Any]]:
    names = (
        ("lora_embedding_A", "lora_embedding_B")
        if module.embedding
        else ("lora_A.weight", "lora_B.weight")
    )
    if not set(names) <= set(tensors):
        raise ValueError(f"{module.name} has only one of lora_A and lora_B")
    a, b = (tensors[n] for n in names)
    r = pattern(config, "rank_pattern", module.name, number(config, "r"))
    if a.shape[0] != r or b.shape[1] != r:
        raise ValueError(
            f"{module.name} has lora_A {a.shape} and lora_B {b.shape}, expected rank {r}"
        )
    alpha = pattern(config, "alpha_pattern", module.name, number(config, "lora_alpha"))
    rslora = bool(config.get("use_rslora"))
    fields = {
        "a": a.T,
        "b": b.T,
        "scale": np.float32(scaling(alpha, r, rslora)),
        "rslora": rslora,
        "dropout": float(config.get("lora_dropout") or 0.0),
    }
    if config.get("use_qalora"):
        if config.get("use_dora") or module.embedding or rslora:
            raise ValueError(
                f"{module.name}: use_qalora beside use_dora, use_rslora or an embedding is not "
                "supported"
            )
        size = number(config, "qalora_group_size")
        if a.shape[1] * size != module.n_in:
            raise ValueError(
                f"{module.name} has lora_A {a.shape}, expected {module.n_in} inputs in groups "
                f"of {size}"
            )
        return QALoRA, {k: v for k, v in fields.items() if k != "rslora"}
    if not config.get("use_dora"):
        if "lora_magnitude_vector" in tensors:
            raise ValueError(
                f"{module.name} has lora_magnitude_vector, but the adapter does not say use_dora"
            )
        return LoRA, fields
    if "lora_magnitude_vector" not in tensors:
        raise ValueError(f"{module.name} lacks lora_magnitude_vector, which use_dora needs")
    return DoRA, {**fields, "magnitude": tensors["lora_magnitude_vector"].reshape(-1)}


def _describe_lora(nodes: Mapping[str, Any]) -> dict[str, Any]:
    rslora = all(getattr(n, "rslora", False) for n in nodes.values())
    ranks = {m: next(iter(_write_lora(n, False).values())).shape[0] for m, n in nodes.items()}
    alphas = {
        m: round(float(n.scale) * (ranks[m] ** 0.5 if rslora else ranks[m]), 6)
        for m, n in nodes.items()
    }
    r, alpha = usual(ranks.values()), usual(alphas.values())
    kinds = {type(n) for n in nodes.values()}
    if len(kinds) > 1:
        raise ValueError(
            "PEFT's use_dora and use_qalora hold for all modules; this adapter has LoRA, DoRA or "
            "QA-LoRA in parts"
        )
    kind = kinds.pop()
    blocks = (
        {"qalora_group_size": _one(nodes, "qalora_group_size", lambda n: n.block)}
        if kind is QALoRA
        else {}
    )
    return {
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": usual(n.dropout for n in nodes.values()),
        "use_rslora": rslora,
        "use_dora": kind is DoRA,
        "use_qalora": kind is QALoRA,
        **blocks,
        "rank_pattern": exceptions(ranks, r),
        "alpha_pattern": exceptions(alphas, alpha),
        "init_lora_weights": True,
    }


def _swap_factors(node: Any) -> Any:
    """The LoRA or HiRA of the transposed weight; None for DoRA and QA-LoRA, whose other arrays
    belong to one side.
    """
    if type(node) not in (LoRA, HiRA):
        return None
    node = node.plain()
    return node.replace(a=np.swapaxes(node.b, -1, -2), b=np.swapaxes(node.a, -1, -2))


_LORA_OPTIONS = (
    "alpha_pattern init_lora_weights loftq_config lora_alpha lora_dropout megatron_core "
    "qalora_group_size r rank_pattern "
    "runtime_config use_rslora use_dora use_qalora ensure_weight_tying trainable_token_indices "
    "target_parameters"
)

# --------------------------------------------------------------------------------------------------
# AdaLoRA


def _write_adalora(node: AdaLoRA, embedding: bool) -> Tensors:
    return {
        "lora_A": np.asarray(node.a).T,
        "lora_B": np.asarray(node.b).T,
        "lora_E": np.asarray(node.e)[:, None],
    }


def _read_adalora(
    tensors: Tensors, config: Config, module: Module
) -> tuple[type[Weight], dict[str, Any]]:
    r = tensors["lora_A"].shape[0]
    alpha = number(config, "lora_alpha")
    first = config.get("init_r") or r  # PEFT divides by init_r, however many ranks are kept
    return AdaLoRA, {
        "a": tensors["lora_A"].T,
        "e": tensors["lora_E"][:, 0],
        "b": tensors["lora_B"].T,
        "scale": np.float32((alpha if alpha > 0 else r) / (first + 1e-5)),
        "dropout": float(config.get("lora_dropout") or 0.0),
        "orthogonal": float(config.get("orth_reg_weight") or 0.0),
    }


def _describe_adalora(nodes: Mapping[str, Any]) -> dict[str, Any]:
    r = _one(nodes, "init_r", lambda n: n.e.shape[-1])
    return {
        "init_r": r,
        "target_r": r,
        "lora_alpha": _one(nodes, "lora_alpha", lambda n: round(float(n.scale) * (r + 1e-5), 4)),
        "lora_dropout": usual(n.dropout for n in nodes.values()),
        "orth_reg_weight": _one(nodes, "orth_reg_weight", lambda n: n.orthogonal) or 0.5,
        "tinit": 0,
        "tfinal": 0,
        "total_step": 1,
    }


# ------------------------------------------------------------------------------------- products of
# two or four factors


def _write_loha(node: LoHa, embedding: bool) -> Tensors:
    used = (
        np.asarray(node.b1).any(axis=1)
        | np.asarray(node.a2).any(axis=0)
        | np.asarray(node.b2).any(axis=1)
    )
    fields = {
        "hada_w1_a": node.b1,
        "hada_w1_b": node.a1,
        "hada_w2_a": node.b2,
        "hada_w2_b": node.a2,
    }
    return {
        n: np.asarray(f)[used].T if n.endswith("a") else np.asarray(f)[:, used].T
        for n, f in fields.items()
    }


def _read_loha(
    tensors: Tensors, config: Config, module: Module
) -> tuple[type[Weight], dict[str, Any]]:
    r = _by_rank(tensors, config, module, "hada_w1_b", 0)
    alpha = pattern(config, "alpha_pattern", module.name, number(config, "alpha"))
    names = {"b1": "hada_w1_a", "a1": "hada_w1_b", "b2": "hada_w2_a", "a2": "hada_w2_b"}
    return LoHa, {**{f: tensors[n].T for f, n in names.items()}, "scale": np.float32(alpha / r)}


def _describe_loha(nodes: Mapping[str, Any]) -> dict[str, Any]:
    ranks = {m: _write_loha(n, False)["hada_w1_b"].shape[0] for m, n in nodes.items()}
    alphas = {m: round(float(n.scale) * ranks[m], 6) for m, n in nodes.items()}
    r, alpha = usual(ranks.values()), usual(alphas.values())
    return {
        "r": r,
        "alpha": alpha,
        "rank_pattern": exceptions(ranks, r),
        "alpha_pattern": exceptions(alphas, alpha),
    }


def _write_lokr(node: LoKr, embedding: bool) -> Tensors:
    tensors: Tensors = {}
    for name, factor in (("lokr_w1", node.w1), ("lokr_w2", node.w2)):
        if isinstance(factor, tuple):
            tensors[f"{name}_a"], tensors[f"{name}_b"] = (
                np.asarray(factor[1]).T,
                np.asarray(factor[0]).T,
            )
        else:
            tensors[name] = np.asarray(factor).T
    return tensors


def _read_lokr(
    tensors: Tensors, config: Config, module: Module
) -> tuple[type[Weight], dict[str, Any]]:
    r = pattern(config, "rank_pattern", module.name, number(config, "r"))
    alpha = pattern(config, "alpha_pattern", module.name, number(config, "alpha"))

    def factor(name: str) -> Any:
        return (
            tensors[name].T if name in tensors else (tensors[f"{name}_b"].T, tensors[f"{name}_a"].T)
        )

    return LoKr, {
        "w1": factor("lokr_w1"),
        "w2": factor("lokr_w2"),
        "scale": np.float32(alpha / r),
        "rank": r,
        "factor": config.get("decompose_factor", -1),
    }


def _describe_lokr(nodes: Mapping[str, Any]) -> dict[str, Any]:
    ranks = {m: n.rank for m, n in nodes.items()}
    alphas = {m: round(float(n.scale) * n.rank, 6) for m, n in nodes.items()}
    r, alpha = usual(ranks.values()), usual(alphas.values())
    return {
        "r": r,
        "alpha": alpha,
        "rank_pattern": exceptions(ranks, r),
        "alpha_pattern": exceptions(alphas, alpha),
        "decompose_both": any(isinstance(n.w1, tuple) for n in nodes.values()),
        "decompose_factor": _one(nodes, "decompose_factor", lambda n: n.factor),
    }


def _write_hira(node: HiRA, embedding: bool) -> Tensors:
    a, b = np.asarray(node.a), np.asarray(node.b)
    used = a.any(axis=0) | b.any(axis=1)
    names = ("hira_embedding_A", "hira_embedding_B") if embedding else ("hira_A", "hira_B")
    return {names[0]: a[:, used].T, names[1]: b[used].T}


def _read_hira(
    tensors: Tensors, config: Config, module: Module
) -> tuple[type[Weight], dict[str, Any]]:
    names = ("hira_embedding_A", "hira_embedding_B") if module.embedding else ("hira_A", "hira_B")
    fields = {
        "a": tensors[names[0]].T,
        "b": tensors[names[1]].T,
    }  # PEFT 0.21 does not read its rank_pattern
    return HiRA, {**fields, "dropout": float(config.get("hira_dropout") or 0.0)}


def _describe_hira(nodes: Mapping[str, Any]) -> dict[str, Any]:
    r = _one(nodes, "r", lambda n: _write_hira(n, False)["hira_A"].shape[0])
    return {"r": r, "hira_dropout": usual(n.dropout for n in nodes.values())}


def _write_gralora(node: GraLoRA, embedding: bool) -> Tensors:
    tensors = {"gralora_A": np.asarray(node.a), "gralora_B": np.asarray(node.b)}
    if node.hybrid is not None:
        tensors |= {
            f"gralora_{n}_general.weight": np.asarray(f).T
            for n, f in zip("AB", node.hybrid, strict=True)
        }
    return tensors


def _read_gralora(
    tensors: Tensors, config: Config, module: Module
) -> tuple[type[Weight], dict[str, Any]]:
    hybrid = config.get("hybrid_r") or 0
    names = [f"gralora_{n}_general.weight" for n in "AB"]
    return GraLoRA, {
        "a": tensors["gralora_A"],
        "b": tensors["gralora_B"],
        "scale": np.float32(number(config, "alpha") / (number(config, "r") + hybrid)),
        "hybrid": tuple(tensors[n].T for n in names) if hybrid else None,
        "dropout": float(config.get("gralora_dropout") or 0.0),
    }


def _describe_gralora(nodes: Mapping[str, Any]) -> dict[str, Any]:
    r = _one(nodes, "r", lambda n: n.a.shape[-1])
    hybrid = _one(nodes, "hybrid_r", lambda n: 0 if n.hybrid is None else n.hybrid[0].shape[-1])
    return {
        "r": r,
        "hybrid_r": hybrid,
        "gralora_k": _one(nodes, "gralora_k", lambda n: n.a.shape[-3]),
        "alpha": _one(nodes, "alpha", lambda n: round(float(n.scale) * (r + hybrid), 4)),
        "gralora_dropout": usual(n.dropout for n in nodes.values()),
    }


def _write_delora(node: DeLoRA, embedding: bool) -> Tensors:
    return {
        "delora_A": np.asarray(node.a).T,
        "delora_B": np.asarray(node.b).T,
        "delora_lambda": np.asarray(node.strength),
        "delora_w_norm": np.asarray(node.norm),
    }


def _read_delora(
    tensors: Tensors, config: Config, module: Module
) -> tuple[type[Weight], dict[str, Any]]:
    _by_rank(tensors, config, module, "delora_A", 0)
    fields = {
        "a": tensors["delora_A"].T,
        "b": tensors["delora_B"].T,
        "strength": tensors["delora_lambda"],
    }
    return DeLoRA, {**fields, "norm": tensors["delora_w_norm"]}


def _describe_delora(nodes: Mapping[str, Any]) -> dict[str, Any]:
    ranks = {m: n.a.shape[-1] for m, n in nodes.items()}
    r = usual(ranks.values())
    if any(n.dropout for n in nodes.values()):
        raise ValueError("PEFT's DeLoRA has no dropout of inputs")
    return {"r": r, "rank_pattern": exceptions(ranks, r)}


# --------------------------------------------------------------------------------------------------
# shared projections


def _write_vera(node: VeRA, embedding: bool) -> Tensors:
    return {"vera_lambda_d": np.asarray(node.d), "vera_lambda_b": np.asarray(node.b)}


def _read_vera(
    tensors: Tensors, config: Config, module: Module
) -> tuple[type[Weight], dict[str, Any]]:
    fields = {"d": tensors["vera_lambda_d"], "b": tensors["vera_lambda_b"]}
    return VeRA, {**fields, "dropout": float(config.get("vera_dropout") or 0.0)}


def _vera_shared(
    tensors: Tensors, config: Config, sizes: tuple[int, int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    if "vera_A" in tensors and "vera_B" in tensors:
        return {}, {"a": tensors["vera_A"].T, "b": tensors["vera_B"].T}
    return {}, projections(number(config, "r"), *sizes, config.get("projection_prng_key", 0))


def _describe_vera(nodes: Mapping[str, Any]) -> dict[str, Any]:
    r = _one(nodes, "r", lambda n: n.d.shape[-1])
    return {
        "r": r,
        "vera_dropout": usual(n.dropout for n in nodes.values()),
        "save_projection": True,
        "projection_prng_key": 0,
    }


def _write_randlora(node: RandLoRA, embedding: bool) -> Tensors:
    return {"randlora_lambda": np.asarray(node.lambdas), "randlora_gamma": np.asarray(node.gamma)}


def _read_randlora(
    tensors: Tensors, config: Config, module: Module
) -> tuple[type[Weight], dict[str, Any]]:
    return RandLoRA, {
        "lambdas": tensors["randlora_lambda"],
        "gamma": tensors["randlora_gamma"],
        "scale": np.float32(number(config, "randlora_alpha") / number(config, "r")),
        "dropout": float(config.get("randlora_dropout") or 0.0),
    }


def _randlora_shared(
    tensors: Tensors, config: Config, sizes: tuple[int, int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    if not {"randlora_A", "randlora_B"} <= set(tensors):
        raise ValueError(
            "the RandLoRA adapter was saved without its projections; save it with "
            "save_projection=True"
        )
    return {}, {"a": tensors["randlora_A"], "b": tensors["randlora_B"]}


def _describe_randlora(nodes: Mapping[str, Any]) -> dict[str, Any]:
    r = _one(nodes, "r", lambda n: n.lambdas.shape[-2])
    return {
        "r": r,
        "randlora_alpha": _one(nodes, "randlora_alpha", lambda n: round(float(n.scale) * r, 4)),
        "randlora_dropout": usual(n.dropout for n in nodes.values()),
        "save_projection": True,
    }


def _write_vblora(node: VBLoRA, embedding: bool) -> Tensors:
    return {
        "vblora_logits_A": np.asarray(node.logits_a),
        "vblora_logits_B": np.asarray(node.logits_b),
    }


def _read_vblora(
    tensors: Tensors, config: Config, module: Module
) -> tuple[type[Weight], dict[str, Any]]:
    fields = {"logits_a": tensors["vblora_logits_A"], "logits_b": tensors["vblora_logits_B"]}
    return VBLoRA, {
        **fields,
        "top_k": config.get("topk", 2),
        "dropout": float(config.get("vblora_dropout") or 0.0),
    }


def _vblora_shared(
    tensors: Tensors, config: Config, sizes: tuple[int, int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    if "vblora_vector_bank" not in tensors:
        raise ValueError("the VB-LoRA adapter lacks base_model.vblora_vector_bank")
    return {"bank": tensors["vblora_vector_bank"]}, {}


def _describe_vblora(nodes: Mapping[str, Any]) -> dict[str, Any]:
    def length(n: Any) -> int:
        return n.features[0] // n.logits_a.shape[-2]

    return {
        "r": _one(nodes, "r", lambda n: n.logits_a.shape[-3]),
        "num_vectors": _one(nodes, "num_vectors", lambda n: n.logits_a.shape[-1]),
        "vector_length": _one(nodes, "vector_length", length),
        "topk": _one(nodes, "topk", lambda n: n.top_k),
        "vblora_dropout": usual(n.dropout for n in nodes.values()),
    }


# --------------------------------------------------------------------------------------------------
# rotations


def _write_oft(node: OFT, embedding: bool) -> Tensors:
    return {"oft_R.weight": np.asarray(node.skew)}


def _read_oft(
    tensors: Tensors, config: Config, module: Module
) -> tuple[type[Weight], dict[str, Any]]:
    skew = tensors["oft_R.weight"]
    block_size = (1 + round((1 + 8 * skew.shape[1]) ** 0.5)) // 2
    return OFT, {
        "skew": skew,
        "block_size": block_size,
        "terms": config.get("num_cayley_neumann_terms", 5)
        if config.get("use_cayley_neumann", True)
        else 0,
        "constrained": bool(config.get("coft")),
        "eps": float(config.get("eps", 6e-5)),
    }


def _describe_oft(nodes: Mapping[str, Any]) -> dict[str, Any]:
    terms = _one(nodes, "num_cayley_neumann_terms", lambda n: n.terms)
    return {
        "r": 0,
        "oft_block_size": _one(nodes, "oft_block_size", lambda n: n.block_size),
        "coft": _one(nodes, "coft", lambda n: n.constrained),
        "eps": _one(nodes, "eps", lambda n: n.eps),
        "block_share": all(n.skew.shape[-2] == 1 for n in nodes.values()),
        "use_cayley_neumann": terms > 0,
        "num_cayley_neumann_terms": terms or 5,
    }


def _write_boft(node: BOFT, embedding: bool) -> Tensors:
    return {"boft_R": np.asarray(node.r), "boft_s": np.asarray(node.s)[:, None]}


def _read_boft(
    tensors: Tensors, config: Config, module: Module
) -> tuple[type[Weight], dict[str, Any]]:
    return BOFT, {"r": tensors["boft_R"], "s": tensors["boft_s"][:, 0]}


def _describe_boft(nodes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "boft_block_size": _one(nodes, "boft_block_size", lambda n: n.r.shape[-1]),
        "boft_block_num": 0,
        "boft_n_butterfly_factor": _one(nodes, "boft_n_butterfly_factor", lambda n: n.r.shape[-4]),
    }


def _write_hra(node: HRA, embedding: bool) -> Tensors:
    return {"hra_u": np.asarray(node.u)}


def _read_hra(
    tensors: Tensors, config: Config, module: Module
) -> tuple[type[Weight], dict[str, Any]]:
    return HRA, {"u": tensors["hra_u"], "orthogonal": bool(config.get("apply_GS"))}


def _describe_hra(nodes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "r": _one(nodes, "r", lambda n: n.u.shape[-1]),
        "apply_GS": _one(nodes, "apply_GS", lambda n: n.orthogonal),
    }


def _write_road(node: RoAd, embedding: bool) -> Tensors:
    return {"road_theta": np.asarray(node.theta), "road_alpha": np.asarray(node.alpha)}


def _read_road(
    tensors: Tensors, config: Config, module: Module
) -> tuple[type[Weight], dict[str, Any]]:
    fields = {"theta": tensors["road_theta"], "alpha": tensors["road_alpha"]}
    return RoAd, {
        **fields,
        "variant": config.get("variant", "road_1"),
        "group_size": config.get("group_size", 64),
    }


def _describe_road(nodes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _one(nodes, name, lambda n, name=name: getattr(n, name))
        for name in ("variant", "group_size")
    }


# ----------------------------------------------------------------------------------------- single
# entries and spectra


def _write_spectrum(name: str) -> Callable[[Any, bool], Tensors]:
    return lambda node, embedding: {name: np.asarray(node.spectrum)}


def _read_spectrum(tensors: Tensors, config: Config, module: Module, name: str) -> dict[str, Any]:
    spectrum, seed = tensors[name], config.get("random_loc_seed", 777)
    if spectrum.size > module.n_in * module.n_out:
        raise ValueError(
            f"{module.name} has {spectrum.size} frequencies for {module.n_in} x "
            f"{module.n_out} entries"
        )
    places = Generator(seed).permutation(module.n_in * module.n_out, spectrum.size).astype(np.int32)
    return {
        "spectrum": spectrum,
        "places": places,
        "scale": np.float32(number(config, "scaling")),
        "seed": seed,
    }


def _describe_spectrum(nodes: Mapping[str, Any]) -> dict[str, Any]:
    counts = {m: n.spectrum.shape[-1] for m, n in nodes.items()}
    usual_count = usual(counts.values())
    return {
        "n_frequency": usual_count,
        "n_frequency_pattern": exceptions(counts, usual_count, whole=False),
        "scaling": _one(nodes, "scaling", lambda n: round(float(n.scale), 6)),
        "random_loc_seed": _one(nodes, "random_loc_seed", lambda n: n.seed),
    }


def _read_fourierft(
    tensors: Tensors, config: Config, module: Module
) -> tuple[type[Weight], dict[str, Any]]:
    return FourierFT, _read_spectrum(tensors, config, module, "fourierft_spectrum")


def _read_waveft(
    tensors: Tensors, config: Config, module: Module
) -> tuple[type[Weight], dict[str, Any]]:
    fields = _read_spectrum(tensors, config, module, "waveft_spectrum")
    return WaveFT, {
        **fields,
        "wavelet": config.get("wavelet_family", "db1"),
        "transform": config.get("use_idwt", True),
    }


def _describe_waveft(nodes: Mapping[str, Any]) -> dict[str, Any]:
    own = {
        "wavelet_family": _one(nodes, "wavelet_family", lambda n: n.wavelet),
        "use_idwt": _one(nodes, "use_idwt", lambda n: n.transform),
    }
    return _describe_spectrum(nodes) | own


def _write_shira(node: SHiRA, embedding: bool) -> Tensors:
    places = np.asarray(node.places)
    n_in = node.features[0]
    return {
        "shira_indices": np.stack([places // n_in, places % n_in]).astype(np.int32),
        "shira_weight": np.asarray(node.values),
    }


def _read_shira(
    tensors: Tensors, config: Config, module: Module
) -> tuple[type[Weight], dict[str, Any]]:
    rows, cols = tensors["shira_indices"].astype(np.int64)
    if rows.size and not (
        0 <= rows.min() <= rows.max() < module.n_out and 0 <= cols.min() <= cols.max() < module.n_in
    ):
        raise ValueError(
            f"{module.name} has shira_indices outside its {module.n_out} x {module.n_in} weight"
        )
    return SHiRA, {
        "values": tensors["shira_weight"],
        "places": (rows * module.n_in + cols).astype(np.int32),
    }


def _describe_shira(nodes: Mapping[str, Any]) -> dict[str, Any]:
    r = _one(nodes, "r", lambda n: n.values.shape[-1] / sum(n.features))
    if r != int(r):
        raise ValueError(
            "PEFT's SHiRA trains r (in + out) entries of a weight; this adapter has another number"
        )
    return {"r": int(r), "mask_type": "random"}


def _write_c3a(node: C3A, embedding: bool) -> Tensors:
    return {"c3a_kernel": np.asarray(node.kernel)}


def _read_c3a(
    tensors: Tensors, config: Config, module: Module
) -> tuple[type[Weight], dict[str, Any]]:
    return C3A, {"kernel": tensors["c3a_kernel"]}


def _describe_c3a(nodes: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {m: n.kernel.shape[-1] for m, n in nodes.items()}
    size = usual(sizes.values())
    return {"block_size": size, "block_size_pattern": exceptions(sizes, size, whole=False)}


def _write_miss(node: Any, embedding: bool) -> Tensors:
    return {"miss_block": np.asarray(node.block)}


def _read_miss(
    tensors: Tensors, config: Config, module: Module
) -> tuple[type[Weight], dict[str, Any]]:
    node = BatMiSS if config.get("init_weights") == "bat" else MiSS
    return node, {
        "block": tensors["miss_block"],
        "dropout": float(config.get("miss_dropout") or 0.0),
    }


def _describe_miss(nodes: Mapping[str, Any]) -> dict[str, Any]:
    kind = _one(nodes, "init_weights", _miss_kind)
    return {
        "r": _one(nodes, "r", lambda n: n.block.shape[-2]),
        "mini_r": _one(nodes, "mini_r", lambda n: n.block.shape[-1]) if kind == "mini" else 1,
        "init_weights": True if kind == "miss" else kind,
        "miss_dropout": usual(n.dropout for n in nodes.values()),
    }


def _miss_kind(node: Any) -> str:
    if isinstance(node, BatMiSS):
        return "bat"
    return "miss" if node.block.shape[-1] == node.features[1] else "mini"


def _write_tokens(node: TrainableTokens, embedding: bool) -> Tensors:
    return {"trainable_tokens_delta": np.asarray(node.rows)}


def _read_tokens(
    tensors: Tensors, config: Config, module: Module
) -> tuple[type[Weight], dict[str, Any]]:
    ids: Any = config.get("token_indices") or config.get("trainable_token_indices")
    if "token_indices" in tensors:  # a tied head's
        ids = tensors["token_indices"].tolist()
    if isinstance(ids, Mapping):
        ids = pattern({"ids": ids}, "ids", module.name, None)
    rows = tensors.get(
        "token_adapter.trainable_tokens_delta", tensors.get("trainable_tokens_delta")
    )
    if not ids or rows is None or len(ids) != len(rows):
        raise ValueError(
            f"{module.name} has rows for trainable tokens that do not fit the token indices {ids}"
        )
    if not all(isinstance(i, int) and 0 <= i < module.n_in for i in ids):
        raise ValueError(
            f"{module.name} has {module.n_in} tokens; the token indices {ids} lie outside"
        )
    return TrainableTokens, {"rows": rows, "ids": np.asarray(ids, np.int32)}


def _describe_tokens(nodes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "token_indices": list(
            _one(nodes, "token_indices", lambda n: tuple(np.asarray(n.ids).tolist()))
        )
    }


# --------------------------------------------------------------------------------------------------
# IA3


def _write_ia3(node: IA3, embedding: bool) -> Tensors:
    scale = np.asarray(node.scale)
    return {"ia3_l": scale[None] if node.feedforward else scale[:, None]}


def _read_ia3(
    tensors: Tensors, config: Config, module: Module
) -> tuple[type[Weight], dict[str, Any]]:
    scale = tensors["ia3_l"]
    wanted = {(module.n_out, 1): False, (1, module.n_in): True}
    if scale.shape not in wanted:
        raise ValueError(
            f"{module.name} has ia3_l {scale.shape}, expected {' or '.join(map(str, wanted))}"
        )
    return IA3, {"scale": scale.reshape(-1), "feedforward": wanted[scale.shape]}


def _describe_ia3(nodes: Mapping[str, Any]) -> dict[str, Any]:
    """Full names throughout: PEFT wants the modules whose inputs are scaled to be among the targets
    by the same name.
    """
    inputs = sorted(m for m, n in nodes.items() if n.feedforward)
    return {"target_modules": sorted(nodes), "feedforward_modules": inputs}


def _options(names: str) -> frozenset[str]:
    return frozenset(names.split())


FORMATS: dict[str, Format] = {
    "LORA": Format(
        (LoRA, DoRA, QALoRA),
        (
            "lora_A.weight",
            "lora_B.weight",
            "lora_embedding_A",
            "lora_embedding_B",
            "lora_magnitude_vector",
        ),
        _write_lora,
        _read_lora,
        _describe_lora,
        _options(_LORA_OPTIONS),
        mirror=_swap_factors,
    ),
    "ADALORA": Format(
        (AdaLoRA,),
        ("lora_A", "lora_B", "lora_E"),
        _write_adalora,
        _read_adalora,
        _describe_adalora,
        _options(
            _LORA_OPTIONS + " target_r init_r tinit tfinal deltaT beta1 beta2 orth_reg_weight "
            "total_step"
        ),
    ),
    "LOHA": Format(
        (LoHa,),
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        _write_loha,
        _read_loha,
        _describe_loha,
        _options("r alpha rank_pattern alpha_pattern"),
    ),
    "LOKR": Format(
        (LoKr,),
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
        _write_lokr,
        _read_lokr,
        _describe_lokr,
        _options("r alpha rank_pattern alpha_pattern decompose_both decompose_factor"),
    ),
    "HIRA": Format(
        (HiRA,),
        ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
        _write_hira,
        _read_hira,
        _describe_hira,
        _options("r rank_pattern hira_dropout"),
        mirror=_swap_factors,
    ),
    "GRALORA": Format(
        (GraLoRA,),
        ("gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight"),
        _write_gralora,
        _read_gralora,
        _describe_gralora,
        _options("r hybrid_r alpha gralora_k gralora_dropout"),
    ),
    "DELORA": Format(
        (DeLoRA,),
        ("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
        _write_delora,
        _read_delora,
        _describe_delora,
        _options("r rank_pattern delora_lambda lambda_pattern"),
    ),
    "VERA": Format(
        (VeRA,),
        ("vera_lambda_d", "vera_lambda_b"),
        _write_vera,
        _read_vera,
        _describe_vera,
        _options("r projection_prng_key save_projection d_initial vera_dropout"),
        {"vera_A": lambda s: fetch(s.fixed["a"]).T, "vera_B": lambda s: fetch(s.fixed["b"]).T},
        _vera_shared,
    ),
    "RANDLORA": Format(
        (RandLoRA,),
        ("randlora_lambda", "randlora_gamma"),
        _write_randlora,
        _read_randlora,
        _describe_randlora,
        _options(
            "r projection_prng_key save_projection randlora_alpha randlora_dropout sparse "
            "very_sparse"
        ),
        {"randlora_A": lambda s: fetch(s.fixed["a"]), "randlora_B": lambda s: fetch(s.fixed["b"])},
        _randlora_shared,
    ),
    "VBLORA": Format(
        (VBLoRA,),
        ("vblora_logits_A", "vblora_logits_B"),
        _write_vblora,
        _read_vblora,
        _describe_vblora,
        _options(
            "r num_vectors vector_length topk vblora_dropout init_vector_bank_bound init_logits_std"
        ),
        {"vblora_vector_bank": lambda s: fetch(s.trained["bank"])},
        _vblora_shared,
    ),
    "OFT": Format(
        (OFT,),
        ("oft_R.weight",),
        _write_oft,
        _read_oft,
        _describe_oft,
        _options(
            "r oft_block_size coft eps block_share use_cayley_neumann num_cayley_neumann_terms"
        ),
    ),
    "BOFT": Format(
        (BOFT,),
        ("boft_R", "boft_s"),
        _write_boft,
        _read_boft,
        _describe_boft,
        _options("boft_block_size boft_block_num boft_n_butterfly_factor"),
    ),
    "IA3": Format(
        (IA3,),
        ("ia3_l",),
        _write_ia3,
        _read_ia3,
        _describe_ia3,
        _options("feedforward_modules init_ia3_weights"),
    ),
    "HRA": Format((HRA,), ("hra_u",), _write_hra, _read_hra, _describe_hra, _options("r apply_GS")),
    "ROAD": Format(
        (RoAd,),
        ("road_theta", "road_alpha"),
        _write_road,
        _read_road,
        _describe_road,
        _options("variant group_size"),
    ),
    "FOURIERFT": Format(
        (FourierFT,),
        ("fourierft_spectrum",),
        _write_spectrum("fourierft_spectrum"),
        _read_fourierft,
        _describe_spectrum,
        _options("n_frequency scaling random_loc_seed n_frequency_pattern"),
    ),
    "WAVEFT": Format(
        (WaveFT,),
        ("waveft_spectrum",),
        _write_spectrum("waveft_spectrum"),
        _read_waveft,
        _describe_waveft,
        _options("n_frequency scaling random_loc_seed n_frequency_pattern wavelet_family use_idwt"),
    ),
    "SHIRA": Format(
        (SHiRA,),
        ("shira_indices", "shira_weight"),
        _write_shira,
        _read_shira,
        _describe_shira,
        _options("r mask_type random_seed"),
    ),
    "C3A": Format(
        (C3A,),
        ("c3a_kernel",),
        _write_c3a,
        _read_c3a,
        _describe_c3a,
        _options("block_size block_size_pattern"),
    ),
    "MISS": Format(
        (MiSS, BatMiSS),
        ("miss_block",),
        _write_miss,
        _read_miss,
        _describe_miss,
        _options("r mini_r miss_dropout"),
    ),
    "TRAINABLE_TOKENS": Format(
        (TrainableTokens,),
        ("token_adapter.trainable_tokens_delta", "trainable_tokens_delta"),
        _write_tokens,
        _read_tokens,
        _describe_tokens,
        _options("token_indices"),
    ),
}
