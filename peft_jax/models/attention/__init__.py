"""Attention through one function that picks the best kernel for the devices of a program.

`attention` runs cuDNN's flash kernel on GPUs, the splash kernel on TPUs, and XLA's own products
elsewhere and where a kernel does not apply. A file for each kernel says what it lacks; `context`
splits rows, heads and long sequences over a mesh.
"""

from __future__ import annotations

import jax

from peft_jax.core.devices import program_device, program_mesh
from peft_jax.models.attention import cudnn, splash, xla
from peft_jax.models.attention.call import Call, Kernel
from peft_jax.models.attention.context import layout_of, run_on_mesh
from peft_jax.models.attention.mask import Mask, make_mask

__all__ = ["KERNELS", "Mask", "attention", "make_mask"]
KERNELS = (splash.KERNEL, cudnn.KERNEL, xla.KERNEL)  # the first that does a call is taken


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    sliding: bool | jax.Array = False,
    scale: float,
    softcap: float | None = None,
    bias: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Grouped-query attention: q [B, T, H, d], k and v [B, S, K, d] -> [B, T, H, d] in q's dtype.

    `bias` [B or 1, H, T, S], float32, is added to the scores (relative positions). `sliding`
    chooses the mask's local part, statically or (in scanned layers that differ) by a traced
    boolean. `implementation` is "xla", "cudnn", "splash" or None for the best that applies. Softmax
    is in float32. Raises ValueError for an implementation that lacks something of the call.
    """
    mesh = program_mesh(q)
    if mesh is not None and mesh.manual_axes:  # the arrays are a device's own
        mesh = None
    layout = layout_of(mesh, q, mask)
    shards = 1 if mesh is None or layout.tokens is None else mesh.shape[layout.tokens]
    device = program_device(q)
    call = Call(q, k, v, mask, sliding, scale, softcap, bias, device, shards)
    kernel = _chosen(call, implementation)
    alone = mesh is None or mesh.size == 1
    if alone or (shards == 1 and not kernel.manual):
        return kernel.run(call)
    return run_on_mesh(kernel, call, mesh, layout)


def _chosen(call: Call, name: str | None) -> Kernel:
    if name is None:
        return next(kernel for kernel in KERNELS if _suits(kernel, call))
    kernel = next((kernel for kernel in KERNELS if kernel.name == name), None)
    if kernel is None:
        *others, last = (kernel.name for kernel in reversed(KERNELS))
        raise ValueError(
            f"unknown attention implementation {name!r}: use {', '.join(others)} or {last}"
        )
    lack = kernel.lacks(call)
    if lack is not None:
        raise ValueError(f"the {name} kernel has no {lack}: use xla, or leave the choice open")
    return kernel


def _suits(kernel: Kernel, call: Call) -> bool:
    """Whether it is the kernel of the call's devices, the call is of its size, and it does it."""
    if kernel.platform is None:
        return True
    here = kernel.platform == call.device.platform
    fits = call.mask.aligned and call.q.shape[1] >= kernel.least
    return here and fits and kernel.lacks(call) is None
