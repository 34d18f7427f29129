"""Buckets of queries and keys by angle: spherical k-means, random directions, and the support of shared buckets.

Nothing here carries a gradient. Points are flattened over sequences and heads: [B, n, D].
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot, pad

from stgen.ops.block_scores import spread
from stgen.ops.support import SOME, Support, codes, sort


@torch.no_grad()
def same_bucket(
    q: Tensor, k: Tensor, allowed: Support, fit: Callable[[Tensor, Tensor], Tensor], buckets: int
) -> Support:
    """The allowed keys in the `buckets` buckets nearest to each query.

    Queries are sorted by the buckets they want and keys by the one they are in, so that the pairs kept fill few blocks;
    nothing of size n x m is built. Where `allowed` hides more than padding they keep their own order, since its blocks
    are blocks of that order.

    `fit` maps unit vectors [B, n + m, D] and which of them are tokens [B, n + m] to centroids [B, clusters, D].
    """
    counts, some = allowed.per_query(), allowed.attended()  # [groups, heads or 1, n], [groups, heads or 1, m]
    filled_q, filled_k = spread(counts > 0, q).flatten(0, 1), spread(some, k).flatten(0, 1)
    points_q, points_k = _directions(q), _directions(k)
    centroids = fit(torch.cat([points_q, points_k], 1), torch.cat([filled_q, filled_k], 1))
    clusters = centroids.shape[1]  # also the number of a further bucket: padding, which no query wants
    taken = _nearest(points_k, centroids).masked_fill(~filled_k, clusters)  # [B, m]
    used = one_hot(taken, clusters + 1)[..., :clusters].any(1, keepdim=True)  # [B, 1, clusters]
    closeness = (points_q @ centroids.transpose(-1, -2)).masked_fill(~used, -torch.inf)
    nearest = closeness.argsort(dim=-1, descending=True, stable=True)[..., :buckets]
    nearest = nearest.masked_fill(~filled_q.unsqueeze(-1), clusters).unflatten(0, q.shape[:2])
    taken = taken.unflatten(0, q.shape[:2])

    if (counts.sum(-1) < (counts > 0).sum(-1) * some.sum(-1)).any():  # a pair of tokens is hidden
        return _of_buckets(nearest, taken, clusters, allowed.block) & allowed
    by_q, by_k = _lexicographic(nearest.sort(-1).values), _lexicographic(taken.unsqueeze(-1))
    sorted_buckets = _of_buckets(sort(nearest, by_q), sort(taken, by_k), clusters, allowed.block)
    return replace(sorted_buckets, query_order=by_q, key_order=by_k)


def _of_buckets(wanted: Tensor, taken: Tensor, clusters: int, block: tuple[int, int]) -> Support:
    """The keys in the buckets that each query wants; those in the bucket `clusters` are wanted by none.

    wanted [S, heads, n, buckets], taken [S, heads, m] int64.
    """
    (bq, bk), n, m = block, wanted.shape[2], taken.shape[2]
    wants = one_hot(wanted, clusters + 1).any(3)  # [S, heads, n, clusters + 1]
    wants[..., clusters] = False
    wants = pad(wants, (0, 0, 0, -n % bq)).unflatten(2, (-1, bq))  # n becomes query blocks, block queries
    taken = pad(taken, (0, -m % bk), value=clusters).unflatten(2, (-1, bk))  # [S, heads, key blocks, block keys]
    held = one_hot(taken, clusters + 1).sum(3).double()  # keys of each bucket; [S, heads, key blocks, clusters + 1]
    table = codes(wants.sum(3).double() @ held.mT, n, m, block)
    s, head, row, column = torch.nonzero(table == SOME).unbind(1)
    bits = wants[s, head, row].gather(2, taken[s, head, column].unsqueeze(1).expand(-1, bq, -1))
    return Support(n, m, block, table, bits)


def _lexicographic(x: Tensor) -> Tensor:
    """The order that sorts rows by their first entry, equal ones by the next: [..., n, r] -> [..., n]; stable."""
    last, *before = reversed(x.unbind(-1))
    order = last.argsort(dim=-1, stable=True)
    for column in before:
        order = order.gather(-1, column.gather(-1, order).argsort(dim=-1, stable=True))
    return order


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
