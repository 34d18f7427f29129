"""Distances between two sets of feature vectors, and from each vector to its nearest in a set; in float64."""

import math
from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["polynomial", "rbf"]


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features [n, d] and [m, d] (arXiv:1706.08500, eq. 6).

    Biased upwards for small sets, more so the larger d is beside n: give n with the number. Raises ValueError for
    fewer than two vectors.
    """
    return frechet_of_gaussians(*_moments(a), *_moments(b))


def frechet_of_gaussians(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), the squared 2-Wasserstein distance.

    The trace of the root is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric and has
    the eigenvalues of A B.
    """
    mean_a, cov_a, mean_b, cov_b = (x.double() for x in (mean_a, cov_a, mean_b, cov_b))
    root = _square_root(cov_a)
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * shared
    return max(0.0, float(distance))  # rounding can leave it a hair below


def mmd(a: Tensor, b: Tensor, kernel: Kernel = "rbf") -> float:
    """Squared maximum mean discrepancy of two sets of features [n, d] and [m, d], unbiased (Gretton et al., JMLR 13, eq. 3).

    Its mean is 0 for two sets of one distribution, so it may come out below 0. Kernels: `polynomial` is
    (x.y / d + 1)^3 (arXiv:1801.01401, section 4), `rbf` is exp(-|x - y|^2 / 2 s^2) with s the median distance within b.
    Raises ValueError for fewer than two vectors.
    """
    a, b = _checked(a), _checked(b)
    width = _median_distance(b) if kernel == "rbf" else 0.0

    def k(x: Tensor, y: Tensor) -> Tensor:
        if kernel == "polynomial":
            return (x @ y.T / x.shape[1] + 1) ** 3
        return torch.exp(-torch.cdist(x, y).square() / (2 * width**2))

    return float(_mean_of_pairs(k(a, a)) + _mean_of_pairs(k(b, b)) - 2 * k(a, b).mean())


def nearest(queries: Tensor, references: Tensor) -> Tensor:
    """Root mean square difference of each query [n, d] to its nearest reference [m, d]: [n], in the unit of the entries.

    Which is the nearest is found by products, in which equal vectors need not be at 0; how far it is by differences.
    """
    closest = torch.cdist(queries, references, compute_mode="use_mm_for_euclid_dist").argmin(1)
    return (queries.double() - references[closest].double()).square().mean(1).sqrt()


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    x = _checked(x)
    return x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1])


def _checked(x: Tensor) -> Tensor:
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"features of at least two clips are needed, [n, d], got {list(x.shape)}")
    return x.double()


def _square_root(matrix: Tensor) -> Tensor:
    """Of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def _median_distance(x: Tensor) -> float:
    distance = float(torch.pdist(x).median())
    return distance if distance > 0 else math.sqrt(x.shape[1])


def _mean_of_pairs(gram: Tensor) -> Tensor:
    """Without those of a vector with itself."""
    n = len(gram)
    return (gram.sum() - gram.trace()) / (n * (n - 1))
