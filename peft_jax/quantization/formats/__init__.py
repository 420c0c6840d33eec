"""Storage formats: which numbers codes can stand for, and how a block of weights gets its scale."""

from peft_jax.quantization.formats.format import (
    FORMATS,
    Activations,
    Format,
    StorageFormat,
    format_names,
    make_format,
)
from peft_jax.quantization.formats.fp4 import FP4
from peft_jax.quantization.formats.fp8 import FP8
from peft_jax.quantization.formats.integers import Int
from peft_jax.quantization.formats.mxfp4 import MXFP4
from peft_jax.quantization.formats.nf4 import NF4
from peft_jax.quantization.formats.table import Table

__all__ = [
    "FORMATS",
    "FP4",
    "FP8",
    "MXFP4",
    "NF4",
    "Activations",
    "Format",
    "Int",
    "StorageFormat",
    "Table",
    "format_names",
    "make_format",
]
