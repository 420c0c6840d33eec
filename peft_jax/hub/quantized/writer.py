"""Which tool writes the quantized weights of a folder."""

from __future__ import annotations

from collections.abc import Iterable

from peft_jax.hub.quantized.tool import TOOLS, Tool
from peft_jax.quantization.quantized import Quantized


def writer(weights: Iterable[Quantized]) -> Tool:
    """The tool that writes all of the weights. Raises ValueError where none can."""
    formats = {w.format for w in weights}
    for tool in TOOLS.values():
        if all(tool.holds(f) for f in formats):
            return tool
    held = "; ".join(f"{t.name} holds {_listed(t)}" for t in TOOLS.values() if t.writes)
    for format in formats:
        if not any(tool.holds(format) for tool in TOOLS.values()):
            raise ValueError(
                f"no checkpoint format holds {format.name} ({held}); call peft_jax.dequantize first"
            )
    raise ValueError(
        f"{' beside '.join(sorted(f.name for f in formats))} fits no checkpoint format ({held}); "
        "quantize all alike or dequantize some"
    )


def _listed(tool: Tool) -> str:
    return ", ".join(f.kind for f in tool.writes)
