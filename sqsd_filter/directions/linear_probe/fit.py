"""The weights of a linear probe: a ridge regression on the hidden states that known rows have.

Row j has the vector z_j of its readings, each of the d values standardised over all rows. With y_j = 1 for an unsafe
row and -1 for another, and a weight w_j, the regression minimises

    Σ_j w_j (<z_j, v> + b - y_j)² + λ d ‖v‖²         the weights' mean is 1

over v and b. Its solution is v = Σ_j α_j z_j / d, where α and b solve a system of one equation per row:

    (K + λ diag(1 / w)) α + b = y,   Σ_j α_j = 0,   K_jk = <z_j, z_k> / d

So the risk is near 1 for rows like the unsafe ones and near -1 for rows like the others. With λ → ∞ the direction is
the difference of the two means. Many fits share one K.

Shapes, as suffixes: n rows, d values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Standardised:
    """The values of n rows with mean 0 and standard deviation 1; a value that never changes is 0. `values_nd` is
    float32, `mean_d` and `scale_d` are float64."""

    values_nd: np.ndarray
    mean_d: np.ndarray
    scale_d: np.ndarray

    @classmethod
    def of(cls, values_nd: np.ndarray) -> Standardised:
        mean_d, scale_d = values_nd.mean(0, dtype=np.float64), values_nd.std(0, dtype=np.float64)
        centred_nd = values_nd - mean_d
        standard_nd = np.divide(centred_nd, scale_d, out=np.zeros_like(centred_nd), where=scale_d > 0)
        return cls(standard_nd.astype(np.float32), mean_d, scale_d)

    def kernel(self) -> np.ndarray:
        """K (n, n) float64, computed in float32."""
        products_nn: np.ndarray = (self.values_nd @ self.values_nd.T).astype(np.float64) / self.values_nd.shape[1]
        return products_nn

    def weights(self, alpha_n: np.ndarray, bias: float) -> tuple[np.ndarray, float]:
        """The weights (d,) and the bias for values as they are read, not standardised."""
        v_d = alpha_n @ self.values_nd.astype(np.float64) / self.values_nd.shape[1]
        weight_d = np.divide(v_d, self.scale_d, out=np.zeros_like(v_d), where=self.scale_d > 0)
        return weight_d, bias - float(weight_d @ self.mean_d)


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


def solve(kernel_nn: np.ndarray, unsafe_n: np.ndarray, weights_n: np.ndarray, ridge: float) -> tuple[np.ndarray, float]:
    """α (n,) and b; α is 0 for rows without weight. Raises `numpy.linalg.LinAlgError` where there is no solution."""
    used = np.flatnonzero(weights_n)
    n = len(used)
    system = np.zeros((n + 1, n + 1))
    system[:n, :n] = kernel_nn[np.ix_(used, used)]
    system[np.arange(n), np.arange(n)] += ridge / weights_n[used]
    system[:n, n] = system[n, :n] = 1
    solution = np.linalg.solve(system, np.append(np.where(unsafe_n[used], 1.0, -1.0), 0.0))
    alpha_n = np.zeros(len(weights_n))
    alpha_n[used] = solution[:n]
    return alpha_n, float(solution[n])
