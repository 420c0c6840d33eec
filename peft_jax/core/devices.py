"""The devices that a program is for, which need not be those that it is traced on.

A program for a TPU pod is traced and compiled on a machine without TPUs as well: its mesh says what
runs it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax


class Device(NamedTuple):
    """A kind of device: `platform` is "cpu", "gpu" or "tpu", `kind` a name as "NVIDIA H100"."""

    platform: str
    kind: str


def program_mesh(*arrays: Any) -> Any:
    """The abstract mesh of the program that is being traced: the one that is entered, or that of
    the first of `arrays` that lies on one; None without any, and inside of a `shard_map`, where
    arrays are a device's own.
    """
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in arrays)]
    found = next((mesh for mesh in meshes if not mesh.empty), None)
    return None if found is None or found.manual_axes else found


def program_device(*arrays: Any) -> Device:
    """What runs the program that is being traced: the devices of its mesh (see `program_mesh`), and
    where none says so JAX's default ones.
    """
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in arrays)]
    for mesh in meshes:
        device = None if mesh.empty else mesh.abstract_device
        if device is not None:
            return Device(device.platform, device.device_kind)
    return Device(jax.default_backend(), jax.local_devices()[0].device_kind)
