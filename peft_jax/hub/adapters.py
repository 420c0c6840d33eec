"""Adapter folders in and out, in the format that fits: Hugging Face PEFT's, AdapterHub's or this
package's own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Literal

from peft_jax.core.adapters import adapter_names, drop_adapters
from peft_jax.core.attachment import Attachment
from peft_jax.core.files import read_json
from peft_jax.core.reparametrised import Replacement
from peft_jax.core.tree import places, stack_of
from peft_jax.core.weight import Trainable
from peft_jax.hub.adapterhub import load_adapterhub, save_adapterhub
from peft_jax.hub.native import FORMAT, load_native, save_native
from peft_jax.hub.peft import load_peft, save_peft
from peft_jax.hub.peft.formats import WholeFormat, format_of, whole_formats
from peft_jax.hub.peft.tied import can_say
from peft_jax.hub.peft.trainable_tokens import FORMAT as TOKENS
from peft_jax.hub.peft.whole import save_whole
from peft_jax.hub.safetensors_io import CONFIG

logger = logging.getLogger("peft_jax")


def save_adapter(
    folder: str | os.PathLike[str],
    params: Any,
    *,
    name: str = "default",
    base: str | None = None,
    revision: str | None = None,
    task_type: str | None = "CAUSAL_LM",
    format: Literal["auto", "peft", "adapterhub", "native"] = "auto",
) -> None:
    """Write the adapter `name` in `params` as a folder; `base` names the base model's repository or
    folder.

    auto takes Hugging Face PEFT's format for one of its methods, AdapterHub's for what it can say
    of bottleneck adapters, and this package's own for everything else, several methods together
    included. What trains beside it (biases, `modules_to_save`, trainable tokens) goes along. Raises
    ValueError naming the place where the tree holds no such adapter, or something that the format
    cannot say. On several hosts all of them call this, since what is written is gathered from them
    (the base stays where it is), and the first one writes.
    """
    nodes = _named(params, name)
    if format not in ("auto", "peft", "adapterhub", "native"):
        raise ValueError(f"unknown format {format!r}; there are auto, peft, adapterhub and native")
    chosen = _fitting(params, nodes, name, task_type) if format == "auto" else format
    if chosen == "peft":
        if whole := _whole(params, nodes, name):
            return save_whole(
                folder,
                params,
                nodes,
                whole,
                name=name,
                base=base,
                revision=revision,
                task_type=task_type,
            )
        return save_peft(
            folder, params, name=name, base=base, revision=revision, task_type=task_type
        )
    if chosen == "adapterhub":
        try:
            return save_adapterhub(folder, params, nodes, name=name, base=base)
        except ValueError as error:
            if format == "adapterhub":
                raise
            logger.info(
                f"written in this package's own format, for AdapterHub's cannot hold it: {error}"
            )
    if not nodes:
        raise ValueError(f"the tree holds no adapter named {name!r}")
    for path, w in places(params).items():
        if isinstance(w, Trainable):
            raise ValueError(
                f"{path} is fully fine-tuned, which an adapter cannot hold; use merge and save"
            )
    return save_native(folder, params, nodes, name=name, base=base, revision=revision)


def _named(params: Any, name: str) -> dict[str, Any]:
    """place -> the node of the adapter `name` there."""

    def mine(n):
        return getattr(n, "name", None) == name

    found = {p: next(filter(mine, stack_of(w)), None) for p, w in places(params).items()}
    return {p: n for p, n in found.items() if n is not None}


def _whole(params: Any, nodes: Mapping[str, Any], name: str) -> WholeFormat | None:
    """PEFT's format of a method that is stored for the model as a whole, if that is what the nodes
    are.
    """
    own = [
        n
        for n in nodes.values()
        if not (isinstance(n, Replacement) and n.saved_as in ("module", "base"))
    ]
    for kind in whole_formats() if own else ():
        if all(kind.holds(n) for n in own):
            return kind if kind.fit is None or kind.fit(params, nodes, name) else None
    return None


def _fitting(params: Any, nodes: Mapping[str, Any], name: str, task_type: str | None) -> str:
    mine = [n for n in nodes.values() if not isinstance(n, Replacement)]
    kinds = {format_of(n) for n in mine} - {TOKENS}
    biases_alone = not mine and any(getattr(n, "saved_as", "") == "bias" for n in nodes.values())
    one = len(kinds) <= 1 and None not in kinds and not biases_alone
    if _whole(params, nodes, name) or (one and can_say(params, nodes, task_type)):
        return "peft"
    return (
        "adapterhub"
        if mine and all(isinstance(n, Attachment) for n in nodes.values())
        else "native"
    )


def load_adapter(
    params: Any,
    folder: str | os.PathLike[str],
    *,
    name: str = "default",
    revision: str | None = None,
    replace: bool = False,
) -> Any:
    """`params` with the adapter of a folder or repository in it, ready to run or to train on.

    The folder is Hugging Face PEFT's, AdapterHub's (safetensors) or this package's. Layers of a
    stacked tree may have LoRAs of different rank (they are padded with zeros, which stay zero in
    training), or no adapter. With `replace` it takes the place of the adapter of that name. Raises
    FileNotFoundError, or ValueError naming the option, module or tensor that cannot be used, and
    for a name that the tree has already.
    """
    from peft_jax.hub.checkpoint import local_folder

    if name in adapter_names(params):
        if not replace:
            raise ValueError(
                f"the tree holds an adapter {name!r} already; load this one with another name=, or "
                "replace=True"
            )
        params = drop_adapters(params, [name])
    path = local_folder(folder, revision)
    config = read_json(path / CONFIG)
    if config.get("format") == FORMAT:
        return load_native(params, path, name)
    if "peft_type" not in config and "config" in config:
        return load_adapterhub(params, path, config, name)
    return load_peft(params, path, name=name)
