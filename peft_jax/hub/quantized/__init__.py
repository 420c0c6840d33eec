"""Quantized checkpoints in and out, codes as they are: nothing is dequantized on the way."""

from peft_jax.hub.quantized.reader import QuantizedReader
from peft_jax.hub.quantized.tool import TOOLS, Parts, Tool
from peft_jax.hub.quantized.writer import tool_for, ways, writer

__all__ = ["TOOLS", "Parts", "QuantizedReader", "Tool", "tool_for", "ways", "writer"]
