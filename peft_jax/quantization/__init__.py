"""Quantization: storage formats, roundings, training with either."""

from peft_jax.quantization.adam8bit import adamw8bit, scale_by_adam8bit
from peft_jax.quantization.blocks import quantize_in_turn
from peft_jax.quantization.budget import allocate_bits
from peft_jax.quantization.formats import FP4, FP8, MXFP4, NF4, Int
from peft_jax.quantization.qalora import qalora
from peft_jax.quantization.qat import qat
from peft_jax.quantization.quantize import bits_per_weight, dequantize, quantize, quantize_weight
from peft_jax.quantization.quantized import Quantized

__all__ = [
    "FP4",
    "FP8",
    "MXFP4",
    "NF4",
    "Int",
    "Quantized",
    "adamw8bit",
    "allocate_bits",
    "bits_per_weight",
    "dequantize",
    "qalora",
    "qat",
    "quantize",
    "quantize_in_turn",
    "quantize_weight",
    "scale_by_adam8bit",
]
