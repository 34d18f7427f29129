"""Cluster attention: queries attend the keys of their own bucket.

Buckets are found by spherical k-means (Routing Transformer, arXiv:2003.05997; for video SVG2,
arXiv:2505.18875), or by hashing with random directions (Reformer, arXiv:2001.04451, section 2): both put a place into
the bucket of the centroid nearest in angle. A query takes the nearest centroid that some key has taken. Tokens are
sorted by bucket, so that blocks of two other buckets are not computed; beside fixed patterns that hide pairs of tokens
they stay where they are, and the buckets only hide more.
"""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from stgen.attention.pattern import Chosen, Setting


class Cluster(Chosen):
    kind: Literal["cluster"] = "cluster"
    """Keys in the bucket of the query."""
    clusters: PositiveInt = 8
    """Buckets of a sequence in each head; 1 is full attention."""
    method: Literal["kmeans", "lsh"] = "kmeans"
    """kmeans fits the centroids to the queries and keys at hand; lsh takes random directions that never change."""
    iterations: PositiveInt = 4
    """kmeans: rounds of assignment and mean, from points far apart."""
    neighbours: NonNegativeInt = 0
    """Further buckets that a query attends, the next nearest to it."""
    seed: NonNegativeInt = 0
    """lsh: another seed draws other directions."""

    sees_all_queries = True

    def shares(self, setting: Setting):
        buckets, of_block = 1 + self.neighbours, self.clusters * setting.block / setting.places
        # Sorted, a block of queries meets the next bucket too, and a bucket's keys begin within a block.
        blocks = (buckets + of_block) / self.clusters + 1 / setting.blocks
        return min(1.0, buckets / self.clusters), min(1.0, blocks)

    def choosing_flops(self, setting: Setting):
        from stgen.ops.cost import linear_flops

        # Points against centroids: once to choose these, twice a round (who belongs, and the means), once to assign.
        passes = 1 if self.method == "lsh" else 2 + 2 * self.iterations
        assigned = passes * linear_flops(2 * setting.places, setting.head_dim, self.clusters)
        shared = linear_flops(setting.blocks, self.clusters + 1, setting.blocks)  # buckets that two blocks share
        return setting.heads * (assigned + shared)

    def chooser(self, setting: Setting):
        from stgen.ops.clustering import random_directions, same_bucket, spherical_kmeans

        def fit(points, filled):
            if self.method == "lsh":
                return random_directions(self.clusters, self.seed, points)
            return spherical_kmeans(points, filled, self.clusters, self.iterations)

        return lambda q, k, allowed: same_bucket(q, k, allowed, fit, 1 + self.neighbours)
