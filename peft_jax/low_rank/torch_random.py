"""PyTorch's CPU generator, as far as adapters depend on it: some store the seed of their frozen
arrays, not the arrays.

PyTorch draws from the 32-bit Mersenne Twister (Matsumoto and Nishimura 1998), seeded as in the
reference code.
"""

from __future__ import annotations

import math

import numpy as np


class Generator:
    """A stream of draws; each method advances it as the PyTorch function of that name does."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.RandomState(seed % 2**32)

    def uniform(self, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
        """`torch.Tensor.uniform_`, float32: 24 bits a number."""
        bits = self._draw(math.prod(shape)) & np.uint64(2**24 - 1)
        unit = bits.astype(np.float32) * np.float32(2.0**-24)
        return (unit * np.float32(high - low) + np.float32(low)).reshape(shape)

    def kaiming(self, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
        """Uniform within sqrt(6 / fan_in), as PEFT draws the projections of VeRA."""
        bound = math.sqrt(6.0 / fan_in)
        return self.uniform(shape, -bound, bound)

    def permutation(self, n: int, first: int) -> np.ndarray:
        """The first `first` entries of `torch.randperm(n)`: a Fisher-Yates shuffle, of which only
        they are made.
        """
        draws = self._draw(min(first, n - 1))
        moved: dict[int, int] = {}
        result = np.empty(first, np.int64)
        for i in range(first):
            j = i + int(draws[i]) % (n - i) if i < n - 1 else i
            result[i] = moved.get(j, j)
            moved[j] = moved.get(i, i)
        return result

    def _draw(self, count: int) -> np.ndarray:
        return self._bits._bit_generator.random_raw(count)
