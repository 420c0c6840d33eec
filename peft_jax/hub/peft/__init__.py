"""Hugging Face PEFT adapter folders (`adapter_config.json`, `adapter_model.safetensors`) in and
out.

Tensors decide which modules an adapter touches; the config gives the method, its numbers and what
else was trained. Each method's tensors and options are known by a record at the end of a file of
its own (`formats`); what they have in common is in `saving`, `loading`, `whole` and `tied`.
"""

from peft_jax.hub.peft.formats import PEFT_FORMATS, PeftFormat, WholeFormat, format_of
from peft_jax.hub.peft.loading import attach_peft, load_peft
from peft_jax.hub.peft.saving import save_peft, trunk_of

__all__ = [
    "PEFT_FORMATS",
    "PeftFormat",
    "WholeFormat",
    "attach_peft",
    "format_of",
    "load_peft",
    "save_peft",
    "trunk_of",
]
