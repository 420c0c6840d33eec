"""WaveFT (Bilican et al. 2025, arXiv:2505.12532): the change is the inverse 2-D wavelet transform
of a few entries.

Entries are placed as in `fourierft`. The Haar wavelet needs nothing; others take their filters from
PyWavelets (`pip install peft_jax[wavelets]`). With `transform=False` the entries are the change
itself (the paper's SHiRA-like case).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.method import Method
from peft_jax.core.reparametrised import Additive, Site, node, place_nodes
from peft_jax.core.weight import static
from peft_jax.core.where import Selection, Where
from peft_jax.low_rank.fourierft import count_of, draw_places, scatter


@node
class WaveFT(Additive):
    """spectrum [*lead, n], places [*lead, n] in the flattened [out, in] matrix, scale [*lead]."""

    trainable: ClassVar[tuple[str, ...]] = ("spectrum",)
    spectrum: jax.Array
    places: jax.Array
    scale: jax.Array
    wavelet: str = static(default="db1")
    transform: bool = static(default=True)
    seed: int = static(default=777)

    def delta(self) -> jax.Array:
        dense = scatter(self.spectrum, self.places, self.features)
        if self.transform:
            dense = inverse_wavelet(dense, self.wavelet)
        return dense.mT * self.scale[..., None, None]


def filters(wavelet: str) -> tuple[np.ndarray, np.ndarray]:
    """(low-pass, high-pass) reconstruction filters. Raises ValueError for a wavelet that PyWavelets
    lacks.
    """
    if wavelet in ("db1", "haar"):
        return np.array([1.0, 1.0]) / np.sqrt(2), np.array([1.0, -1.0]) / np.sqrt(2)
    try:
        import pywt  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"wavelet {wavelet!r} needs PyWavelets: pip install 'peft_jax[wavelets]'"
        ) from error
    if wavelet not in pywt.wavelist(kind="discrete"):  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(f"unknown wavelet {wavelet!r}; see pywt.wavelist(kind='discrete')")
    found = pywt.Wavelet(wavelet)  # pyright: ignore[reportAttributeAccessIssue]
    return np.asarray(found.rec_lo), np.asarray(found.rec_hi)


def inverse_wavelet(coefficients: jax.Array, wavelet: str) -> jax.Array:
    """One level of the inverse 2-D transform of [*lead, out, in], whose quarters are the
    approximation and details.

    The matrix is padded by what the filters' overlap takes away and the result cropped to its
    middle, as PEFT does.
    """
    low, high = filters(wavelet)
    n_out, n_in = coefficients.shape[-2:]
    pads = []
    for n in (n_out, n_in):
        total = len(low) - 2 + (n + len(low)) % 2
        pads.append((total // 2, total - total // 2))
    dense = jnp.pad(coefficients, [(0, 0)] * (coefficients.ndim - 2) + pads)
    approximation, wide, tall, both = _quarters(dense)
    dense = jnp.concatenate(
        [jnp.concatenate([approximation, tall], -1), jnp.concatenate([wide, both], -1)], -2
    )
    rows = _synthesis(dense.shape[-2], low, high)
    cols = _synthesis(dense.shape[-1], low, high)
    full = jnp.matmul(jnp.matmul(rows, dense), cols.T)
    top, left = (full.shape[-2] - n_out) // 2, (full.shape[-1] - n_in) // 2
    return full[..., top : top + n_out, left : left + n_in]


def _quarters(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Top left, top right (details across rows, where ours would be across columns), bottom left,
    bottom right.
    """
    h, w = x.shape[-2] // 2, x.shape[-1] // 2
    return x[..., :h, :w], x[..., :h, w:], x[..., h:, :w], x[..., h:, w:]


def _synthesis(size: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The matrix that upsamples both halves of a vector, filters them and adds: [size - length + 2,
    size].
    """
    half, length = size // 2, len(low)
    matrix = np.zeros((2 * half + length - 2, size), np.float32)
    for k in range(half):
        matrix[2 * k : 2 * k + length, k] = low
        matrix[2 * k : 2 * k + length, half + k] = high
    return matrix[length - 2 : 2 * half]


def waveft(
    params: Any,
    key: jax.Array,
    *,
    frequencies: int = 2592,
    scale: float = 25.0,
    wavelet: str = "db1",
    transform: bool = True,
    seed: int = 777,
    frequencies_pattern: Mapping[str, int] | None = None,
    **where: Unpack[Where],
) -> Any:
    """`params` with a WaveFT node of `frequencies` trained entries at each place that `targets`
    name.

    `frequencies_pattern` overrides the number for the places that its keys match. The entries start
    at zero.
    """
    at = Selection.of(waveft, where)
    pattern = frequencies_pattern or {}
    filters(wavelet)

    def make(site: Site, key: jax.Array) -> WaveFT:
        lead, n_in, n_out = site.sizes
        count = count_of(site, frequencies, pattern)
        return WaveFT(
            **site.common(name=at.adapter),
            spectrum=jnp.zeros((*lead, count)),
            places=draw_places(lead, n_in * n_out, count, seed),
            scale=jnp.full(lead, scale, jnp.float32),
            wavelet=wavelet,
            transform=transform,
            seed=seed,
        )

    patterns = {"frequencies_pattern": pattern}
    return place_nodes(params, key, make, at, patterns=patterns)


METHOD = Method(
    name="waveft",
    function=waveft,
    nodes=(WaveFT,),
    at="matrices",
    title="WaveFT",
    follows="Bilican et al. 2025, arXiv:2505.12532; PEFT `WaveFTConfig`",
    differs="Places are PEFT's numbers. Layers stacked together have one number of frequencies",
    example={"frequencies": 12},
    variants=(
        {"scale": 5.0},
        {"seed": 1},
        {"frequencies_pattern": {"w": 7}},
        {"transform": False},
        {"wavelet": "haar"},
    ),
)
