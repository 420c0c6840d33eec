"""PEFT's FOURIERFT, and what it shares with WAVEFT: a spectrum at drawn places."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from peft_jax.core.weight import Weight
from peft_jax.hub.peft.formats import (
    Config,
    Module,
    PeftFormat,
    Tensors,
    exceptions,
    number,
    only,
    options,
    usual,
)
from peft_jax.low_rank.fourierft import FourierFT
from peft_jax.low_rank.torch_random import Generator


def write_spectrum(name: str) -> Callable[[Any, bool], Tensors]:
    return lambda node, embedding: {name: np.asarray(node.spectrum)}


def read_spectrum(tensors: Tensors, config: Config, module: Module, name: str) -> dict[str, Any]:
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


def describe_spectrum(nodes: Mapping[str, Any]) -> dict[str, Any]:
    counts = {m: n.spectrum.shape[-1] for m, n in nodes.items()}
    usual_count = usual(counts.values())
    return {
        "n_frequency": usual_count,
        "n_frequency_pattern": exceptions(counts, usual_count, whole=False),
        "scaling": only(nodes, "scaling", lambda n: round(float(n.scale), 6)),
        "random_loc_seed": only(nodes, "random_loc_seed", lambda n: n.seed),
    }


def _read(tensors: Tensors, config: Config, module: Module) -> tuple[type[Weight], dict[str, Any]]:
    return FourierFT, read_spectrum(tensors, config, module, "fourierft_spectrum")


FORMAT = PeftFormat(
    name="FOURIERFT",
    nodes=(FourierFT,),
    tensors=("fourierft_spectrum",),
    write=write_spectrum("fourierft_spectrum"),
    read=_read,
    describe=describe_spectrum,
    options=options("n_frequency scaling random_loc_seed n_frequency_pattern"),
)
