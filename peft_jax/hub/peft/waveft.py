"""PEFT's WAVEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_jax.core.weight import Weight
from peft_jax.hub.peft.formats import Config, Module, PeftFormat, Tensors, only, options
from peft_jax.hub.peft.fourierft import describe_spectrum, read_spectrum, write_spectrum
from peft_jax.low_rank.waveft import WaveFT


def _read(tensors: Tensors, config: Config, module: Module) -> tuple[type[Weight], dict[str, Any]]:
    fields = read_spectrum(tensors, config, module, "waveft_spectrum")
    return WaveFT, {
        **fields,
        "wavelet": config.get("wavelet_family", "db1"),
        "transform": config.get("use_idwt", True),
    }


def _describe(nodes: Mapping[str, Any]) -> dict[str, Any]:
    own = {
        "wavelet_family": only(nodes, "wavelet_family", lambda n: n.wavelet),
        "use_idwt": only(nodes, "use_idwt", lambda n: n.transform),
    }
    return describe_spectrum(nodes) | own


FORMAT = PeftFormat(
    name="WAVEFT",
    nodes=(WaveFT,),
    tensors=("waveft_spectrum",),
    write=write_spectrum("waveft_spectrum"),
    read=_read,
    describe=_describe,
    options=options(
        "n_frequency scaling random_loc_seed n_frequency_pattern wavelet_family use_idwt"
    ),
)
