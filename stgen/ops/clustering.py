"""Buckets of queries and keys by angle: spherical k-means, random directions, and the support of shared buckets.

Nothing here carries a gradient. Points are flattened over sequences and heads: [B, n, D].
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from stgen.ops.block_scores import spread
from stgen.ops.support import Support


@torch.no_grad()
def same_bucket(
    q: Tensor, k: Tensor, allowed: Support, fit: Callable[[Tensor, Tensor], Tensor], buckets: int
) -> Support:
    """The allowed keys in the `buckets` buckets nearest to each query.

    `fit` maps unit vectors [B, n + m, D] and which of them are tokens [B, n + m] to centroids [B, clusters, D].
    """
    filled_q, filled_k = spread(allowed.per_query() > 0, q).flatten(0, 1), spread(allowed.attended(), k).flatten(0, 1)
    points_q, points_k = _directions(q), _directions(k)
    centroids = fit(torch.cat([points_q, points_k], 1), torch.cat([filled_q, filled_k], 1))
    count = centroids.shape[1]
    taken = _nearest(points_k, centroids)  # [B, m]
    used = (one_hot(taken, count) * filled_k.unsqueeze(-1)).any(1, keepdim=True)  # [B, 1, clusters]
    closeness = (points_q @ centroids.transpose(-1, -2)).masked_fill(~used, -torch.inf)
    order = closeness.argsort(dim=-1, descending=True, stable=True)[..., :buckets]
    wanted = one_hot(order, count).any(-2)  # [B, n, clusters]

    def allows(i: Tensor) -> Tensor:
        return wanted[:, i].gather(-1, taken.unsqueeze(1).expand(-1, len(i), -1))

    chosen = Support.from_predicate(allows, allowed.queries, allowed.keys, allowed.block, len(taken), q.device)
    return replace(chosen, table=chosen.table.view(*q.shape[:2], *chosen.table.shape[2:])) & allowed


def random_directions(clusters: int, seed: int, points: Tensor) -> Tensor:
    """Directions that depend on `seed` alone, the same on every device: [B, clusters, D] for points [B, n, D]."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(clusters, points.shape[-1], dtype=torch.float64, generator=generator)
    return normalize(directions, dim=-1).to(points).expand(len(points), -1, -1)


@torch.no_grad()
def spherical_kmeans(points: Tensor, filled: Tensor, clusters: int, iterations: int) -> Tensor:
    """Centroids of unit vectors: points [B, n, D], filled [B, n] bool -> [B, clusters, D], of length 1.

    Deterministic: the first centroid is the point nearest to the mean of all, each next one the point farthest from
    those before. A centroid that loses all its points stays where it is. Places that are not filled have no effect.
    """
    points = points.masked_fill(~filled.unsqueeze(-1), 0)
    centroids = _far_apart(points, filled, clusters)
    for _ in range(iterations):
        member = one_hot(_nearest(points, centroids), clusters).to(points)  # [B, n, clusters]
        total = member.transpose(-1, -2) @ points
        moved = total.norm(dim=-1, keepdim=True) > 0
        centroids = torch.where(moved, normalize(total, dim=-1), centroids)
    return centroids


def _far_apart(points: Tensor, filled: Tensor, clusters: int) -> Tensor:
    """Points chosen farthest-first: [B, clusters, D]."""
    batch = torch.arange(len(points), device=points.device)
    distance = (points @ points.sum(1).unsqueeze(-1)).squeeze(-1)  # the first is that of the largest product
    nearest = torch.full_like(distance, torch.inf)
    chosen = []
    for _ in range(clusters):
        chosen.append(points[batch, distance.masked_fill(~filled, -torch.inf).argmax(-1)])
        nearest = nearest.minimum(1 - (points @ chosen[-1].unsqueeze(-1)).squeeze(-1))
        distance = nearest
    return torch.stack(chosen, dim=1)


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    return (points @ centroids.transpose(-1, -2)).argmax(-1)


def _directions(x: Tensor) -> Tensor:
    """[S, heads, n, D] -> unit vectors [S * heads, n, D], at least float32."""
    return normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).flatten(0, 1)
