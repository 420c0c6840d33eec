"""Which tool writes the quantized weights of a folder."""

from __future__ import annotations

from collections.abc import Iterable

from peft_jax.hub.quantized.tool import TOOLS, Tool, held_formats, writing_tools
from peft_jax.quantization.formats import Format
from peft_jax.quantization.quantized import Quantized


def writer(weights: Iterable[Quantized], name: str | None = None) -> Tool:
    """The tool called `name`, or the first that writes all of the weights for others to read.

    Raises ValueError for a tool that cannot hold their formats, or where none can.
    """
    return tool_for((w.format for w in weights), name)


def tool_for(formats: Iterable[Format], name: str | None = None) -> Tool:
    """The same for weights of these formats."""
    formats = sorted(set(formats), key=_name)
    if name is not None:
        return _named(name, formats)
    for tool in writing_tools():
        if all(map(tool.holds, formats)):
            return tool
    for format in formats:
        if not any(tool.holds(format) for tool in writing_tools()):
            raise ValueError(f"no tool's folders hold {format.name}: {held_formats()}; {ways()}")
    names = " beside ".join(map(_name, formats))
    raise ValueError(f"{names} fits no checkpoint format: {held_formats()}; {ways()}")


def _named(name: str, formats: list[Format]) -> Tool:
    tool = TOOLS.find(name)
    if tool.write is None:
        raise ValueError(f"{name} folders are read and not written: {held_formats()}")
    for format in formats:
        if not tool.holds(format):
            raise ValueError(f"{name} folders hold no {format.name}: {held_formats()}; {ways()}")
    return tool


def _name(format: Format) -> str:
    return format.name


def ways() -> str:
    """What can be done with weights that no tool can hold."""
    own = next(tool.name for tool in TOOLS.values() if tool.own)
    return (
        f"save with tool={own!r}, which peft_jax.load alone reads, or "
        "peft_jax.quantization.dequantize first"
    )
