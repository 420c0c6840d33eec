"""The devices that a program is for, which need not be those that it is traced on.

A program for a TPU pod is traced and compiled on a machine without TPUs as well: its mesh says what
runs it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh

from peft_jax.core.mesh import mesh_of


class Device(NamedTuple):
    """A kind of device: `platform` is "cpu", "gpu" or "tpu", `kind` a name as "NVIDIA H100"."""

    platform: str
    kind: str


def program_mesh(arrays: Any = ()) -> AbstractMesh | None:
    """The mesh of a program: the one that is entered, or else that of the arrays; None without."""
    entered = jax.sharding.get_abstract_mesh()
    return mesh_of(arrays) if entered.empty else entered


def program_device(arrays: Any = ()) -> Device:
    """What runs a program: the devices of its mesh, and where none says so JAX's default ones."""
    mesh = program_mesh(arrays)
    device = None if mesh is None else mesh.abstract_device
    if device is not None:
        return Device(device.platform, device.device_kind)
    return Device(jax.default_backend(), jax.local_devices()[0].device_kind)
