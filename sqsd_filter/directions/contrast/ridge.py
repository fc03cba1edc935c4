"""The direction that tells unsafe rows from other rows: a ridge regression on their updates.

Row j has the vector φ_j of `updates`, so that <φ_j, φ_k> = Σ_m cos(ΔW_j, ΔW_k). With y_j = 1 for an unsafe row and -1
for another, and a weight w_j, the regression minimises

    Σ_j w_j (<φ_j, v> + b - y_j)² + λ M ‖v‖²         M modules, the weights' mean is 1

over v and b. Its solution is v = Σ_j α_j φ_j, where α solves a system of one equation per row:

    (K / M + λ diag(1 / w)) α' + b = y,   Σ_j α'_j = 0,   K_jk = <φ_j, φ_k>,   α = α' / M

The direction V has the coordinates v. A score takes its cosine in each module, so every module counts alike, however
large its part of v.

This is a difference of means (with λ → ∞), made steeper where unsafe and other rows differ reliably and flatter where
rows of one kind differ among themselves. It is a form of regularised linear discriminant.

Shapes, as suffixes: n rows, m modules, f fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch


class Vectors(Protocol):
    """The vectors of n `rows`."""

    rows: int

    def columns(self, where: slice) -> np.ndarray:
        """Some coordinates of all rows: (n, columns) float32."""


def kernel(vectors: Vectors, modules: Sequence[slice]) -> np.ndarray:
    """K / M (n, n): the mean cosine over the modules of each two rows' updates. float64, computed in float32."""
    total_nn = torch.zeros(vectors.rows, vectors.rows)
    for part in _parts(vectors, modules):
        total_nn.addmm_(part, part.T)
    mean_nn: np.ndarray = total_nn.double().numpy() / len(modules)
    return mean_nn


def balanced(unsafe_n: np.ndarray, source_n: np.ndarray, weight_n: np.ndarray) -> np.ndarray:
    """Weights w (n,) of mean 1 by which unsafe rows count as much as the others, and a source as its weight says.

    `source_n` names the source of each row, `weight_n` has that source's weight, which its rows share. A row of no
    weight is left out of both.
    """
    weights_n = np.zeros(len(unsafe_n))
    for kind in (True, False):
        names = np.unique(source_n[(unsafe_n == kind) & (weight_n > 0)])
        members = [np.flatnonzero((unsafe_n == kind) & (source_n == name) & (weight_n > 0)) for name in names]
        total = sum(weight_n[own[0]] for own in members)
        for own in members:
            weights_n[own] = weight_n[own] / total / len(own)
    mean_1_n: np.ndarray = weights_n * (weights_n > 0).sum() / weights_n.sum()
    return mean_1_n


def solve(kernel_nn: np.ndarray, unsafe_n: np.ndarray, weights_n: np.ndarray, ridge: float) -> np.ndarray:
    """α (n,) up to a factor; 0 for rows without weight. Raises `numpy.linalg.LinAlgError` where there is none."""
    used = np.flatnonzero(weights_n)
    n = len(used)
    system = np.zeros((n + 1, n + 1))
    system[:n, :n] = kernel_nn[np.ix_(used, used)]
    system[np.arange(n), np.arange(n)] += ridge / weights_n[used]
    system[:n, n] = system[n, :n] = 1
    alpha_n = np.zeros(len(weights_n))
    alpha_n[used] = np.linalg.solve(system, np.append(np.where(unsafe_n[used], 1.0, -1.0), 0.0))[:n]
    return alpha_n


def apply(vectors: Vectors, modules: Sequence[slice], alpha_nf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The coordinates v = Σ_j α_j φ_j of the direction of the first fit (width,) float32, and with the direction V of
    every fit Σ_m cos(ΔW_j, V) of every row: (n, f) float64. The vectors are read once."""
    weights_nf = torch.from_numpy(alpha_nf).float()
    total_nf = torch.zeros(alpha_nf.shape, dtype=torch.float64)
    first = []
    for part in _parts(vectors, modules):
        directions = weights_nf.T @ part
        first.append(directions[0])
        norms_f1 = torch.linalg.vector_norm(directions, dim=1, keepdim=True)
        total_nf += (part @ torch.where(norms_f1 == 0, 0, directions / norms_f1).T).double()
    return torch.cat(first).numpy(), total_nf.numpy()


def _parts(vectors: Vectors, modules: Sequence[slice]) -> Iterable[torch.Tensor]:
    """The coordinates (n, width) of each module in turn, float32."""
    for where in modules:
        yield torch.from_numpy(vectors.columns(where))
