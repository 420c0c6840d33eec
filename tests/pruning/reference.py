"""NumPy transcriptions of the papers' algorithms, in their own orientation: weights [out, in],
inputs [tokens, in], float64.
"""

import numpy as np


def sparsegpt(w, inputs, sparsity=0.0, n=0, m=0, block=128, damping=0.01):
    """Algorithm 1 of Frantar and Alistarh (2023): (weights, mask of what is kept)."""
    w = w.astype(np.float64).copy()
    columns = w.shape[1]
    hessian = inputs.T @ inputs / len(inputs)
    hessian = hessian + damping * np.mean(np.diag(hessian)) * np.eye(columns)
    inverse = np.linalg.cholesky(np.linalg.inv(hessian)).T
    kept = np.ones_like(w, bool)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = np.zeros((w.shape[0], stop - start))
        if m == 0:
            score = w[:, start:stop] ** 2 / np.diag(inverse)[start:stop] ** 2
            gone = int(sparsity * score.size + 1e-6)
            order = np.argsort(score.ravel(), kind="stable")[:gone]
            part = np.ones(score.size, bool)
            part[order] = False
            kept[:, start:stop] = part.reshape(score.shape)
        for j in range(start, stop):
            if m and j % m == 0:
                score = w[:, j : j + m] ** 2 / np.diag(inverse)[j : j + m] ** 2
                order = np.argsort(score, axis=1, kind="stable")[:, : m - n]
                part = np.ones_like(score, bool)
                np.put_along_axis(part, order, False, 1)
                kept[:, j : j + m] = part
            errors[:, j - start] = np.where(kept[:, j], 0.0, w[:, j]) / inverse[j, j]
            w[:, j:stop] -= np.outer(errors[:, j - start], inverse[j, j:stop]) * (
                np.arange(j, stop) >= j
            )
            w[:, j] = np.where(kept[:, j], w[:, j], 0.0)
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
    return w * kept, kept


def wanda(w, inputs, sparsity=0.0, n=0, m=0):
    """Algorithm 1 of Sun et al. (2023): the mask of what is kept."""
    score = np.abs(w) * np.sqrt((inputs**2).sum(0))
    kept = np.ones_like(w, bool)
    if m:
        for j in range(0, w.shape[1], m):
            order = np.argsort(score[:, j : j + m], axis=1, kind="stable")[:, : m - n]
            np.put_along_axis(kept[:, j : j + m], order, False, 1)
        return kept
    order = np.argsort(score, axis=1, kind="stable")[:, : int(w.shape[1] * sparsity + 1e-6)]
    np.put_along_axis(kept, order, False, 1)
    return kept


def ria(w, inputs, sparsity, power=0.5):
    """Equation 4 of Zhang et al. (2024), ranked over the whole matrix: the mask of what is kept."""
    size = np.abs(w)
    score = size / size.sum(0) + size / size.sum(1, keepdims=True)
    score = score * np.linalg.norm(inputs, axis=0) ** power
    kept = np.ones(w.size, bool)
    kept[np.argsort(score.ravel(), kind="stable")[: int(w.size * sparsity + 1e-6)]] = False
    return kept.reshape(w.shape)
