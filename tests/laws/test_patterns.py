"""Every pattern is what its oracle says, on odd grids, among padding and in batches; and the promises of each."""

import math
from dataclasses import replace

import pytest
import torch
from patterns import PATTERNS, build, family, scene, told
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from stgen.attention.pattern import Chosen, Fixed, Remade, Setting, Sites
from stgen.attention.patterns import KINDS
from stgen.ops.clustering import spherical_kmeans
from stgen.ops.sinkhorn import sinkhorn
from stgen.ops.support import ALL, SOME, Support
from stgen.tokens import Grid

GRIDS = [Grid(3, 4, 5), Grid(1, 1, 1), Grid(1, 3, 2), Grid(5, 1, 9), Grid(7, 2, 3)]
HEADS, WIDTH = 2, 6


def named(kind: str) -> list[str]:
    return [name for name, config in PATTERNS.items() if family(config) == kind]


def orders_of(name: str) -> list[str]:
    return ["tile"] if build(PATTERNS[name]).needs_tiles else ["raster", "tile"]


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def setting(places, block, heads=HEADS, layer=0):
    return Setting(heads, WIDTH, places, block, (1, 1, block), layer)


def attend(q, k, v, support):
    """Softmax over a support, or over all keys; rows without keys give zeros."""
    return attend_mask(q, k, v, None if support is None else support.expand(*q.shape[:2]).dense())


def attend_mask(q, k, v, mask):
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    return (scores.masked_fill(~mask, torch.finfo(q.dtype).min).softmax(-1) * mask) @ v


def test_every_pattern_has_an_oracle():
    assert {config["kind"] for config in PATTERNS.values()} == KINDS.keys() - {"any", "all"}


# -------------------------------------------------------------------------------------------------------------- fixed


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    "name, order",
    [(name, order) for name in named("fixed") for order in orders_of(name)],
)
def test_a_fixed_pattern_is_its_oracle(name, order, grid):
    pattern = build(PATTERNS[name])
    place = scene(grid, order=order, layer=3)
    support = place.support(pattern)
    assert torch.equal(support.dense()[0, 0], place.oracle(told(PATTERNS[name])))


@pytest.mark.parametrize("name", named("fixed"))
def test_a_row_does_not_depend_on_the_rows_and_keys_asked_for_with_it(name):
    place = scene(Grid(3, 4, 5), order="tile")
    pattern = build(PATTERNS[name])
    whole = place.support(pattern).dense()[0, 0]
    rows, keys = torch.tensor([41, 3, 17]), torch.tensor([50, 9, 22, 4])

    def sites(i, shape):
        return Sites(*(x.view(shape) for x in (*place.where[i].unbind(-1), place.blocks[i])))

    part = pattern.allows(sites(rows, (1, -1, 1)), sites(keys, (1, 1, -1)), place.frame)[0]
    part = part & place.filled[rows][:, None] & place.filled[keys]
    assert torch.equal(part, whole[rows][:, keys])


def test_global_tokens_see_all_and_are_seen_by_all():
    place = scene(Grid(3, 2, 2))
    mask = place.support(build({"kind": "global", "tokens": [(1, 0, 1)]})).dense()[0, 0]
    chosen = (place.where == torch.tensor([1, 0, 1])).all(-1)
    assert mask[chosen].all() and mask[:, chosen].all()
    assert not mask[~chosen][:, ~chosen].any()


def test_random_blocks_are_drawn_by_seed_and_layer_and_all_of_them_are_full():
    def mask(layer=0, **keys):
        return scene(Grid(6, 4, 4), layer=layer).support(build({"kind": "random", **keys})).dense()[0, 0]

    assert torch.equal(mask(seed=1), mask(seed=1))
    assert (mask(seed=1) != mask(seed=2)).any() and (mask(layer=1) != mask(layer=2)).any()
    assert mask(blocks=12).all() and mask(blocks=99).all()
    assert (mask(blocks=3).sum(-1) == 3 * 8).all()


def test_random_blocks_are_drawn_evenly():
    """Over 40 layers every pair of 12 x 12 blocks is drawn 10 times on average; none is left out or drawn always."""
    pattern = build({"kind": "random", "blocks": 3})
    table = sum(scene(Grid(6, 4, 4), layer=layer).support(pattern).kept[0, 0].int() for layer in range(40))
    assert int(table.min()) > 0 and int(table.max()) < 25


@pytest.mark.parametrize("window", [(3, 1, 1), (2, 2, 3), (1, 9, 2)])
def test_sliding_tiles_keep_whole_blocks_and_the_density_of_their_window(window):
    place = scene(Grid(6, 8, 6), order="tile")
    support = place.support(build({"kind": "sliding_tile", "window": window}))
    expected = math.prod(min(size, tiles) / tiles for size, tiles in zip(window, (3, 4, 3), strict=True))
    assert support.density() == pytest.approx((expected, expected), abs=1e-12)
    assert not (support.table == SOME).any()
    ragged = scene(Grid(5, 8, 7), order="tile")
    support = ragged.support(build({"kind": "sliding_tile", "window": window}))
    whole = ragged.filled.view(-1, ragged.block).all(-1)
    assert not (support.table[0, 0][whole][:, whole] == SOME).any()


def test_radial_costs_the_same_for_each_doubling_of_the_distance():
    """Own frame, its neighbours and the sink are whole: 4 h w. Each doubling adds at most h w before and after."""
    h, w = 4, 5
    for t in (4, 8, 16, 32, 64):
        place = scene(Grid(t, h, w))
        pairs = int(place.support(build({"kind": "radial"})).per_query().sum())
        assert pairs <= place.places * h * w * (4 + 2 * math.floor(math.log2(t - 1)))
        assert pairs <= 6 * place.places * h * w * math.log2(t)
    assert pairs < 0.15 * place.places**2
    sparse = int(place.support(build({"kind": "radial", "density": 0.5})).per_query().sum())
    assert sparse < pairs


@pytest.mark.parametrize(
    "keys, sentence",
    [
        ({"kind": "strided", "stride": 0}, "write 1 to take every token"),
        ({"kind": "strided", "stride": (1, 0, 1)}, "write 1 to take every token"),
        ({"kind": "global"}, "give frames"),
        ({"kind": "three_way", "branches": ["slide", "slide"]}, "name each once"),
    ],
)
def test_keys_without_meaning_are_refused_in_a_sentence(keys, sentence):
    with pytest.raises(ValidationError, match=sentence) as error:
        build(keys)
    assert error.value.error_count() == 1


# ------------------------------------------------------------------------------------------------------------- chosen


def padded(groups, n, block):
    """Supports of `groups` sequences that end in padding: every token attends every token."""
    filled = torch.arange(n) < torch.tensor([n - 2 * g for g in range(groups)])[:, None]
    return Support.from_mask((filled[:, :, None] & filled[:, None])[:, None], (block, block))


def sparse(groups, n, block):
    """Random supports with rows that have no key and keys that have no row."""
    mask = draw(groups, 1, n, n, seed=5) > 0
    mask[:, :, n // 3] = False
    mask[:, :, :, n // 2] = False
    return Support.from_mask(mask, (block, block))


def chosen_by(name, n, block, heads=HEADS):
    torch.manual_seed(1)
    choose = build(PATTERNS[name]).chooser(setting(n, block, heads))
    return choose.double() if isinstance(choose, torch.nn.Module) else choose


@pytest.mark.parametrize("make", [padded, sparse])
@pytest.mark.parametrize("n, block", [(21, 4), (16, 4), (1, 1), (5, 1), (9, 9)])
@pytest.mark.parametrize("name", named("chosen"))
def test_a_chosen_pattern_is_its_oracle_within_what_is_allowed(name, n, block, make):
    groups = 2 if n > 4 else 1
    allowed = make(groups, n, block)
    q, k = draw(2 * groups, HEADS, n, WIDTH), draw(2 * groups, HEADS, n, WIDTH, seed=1)
    choose = chosen_by(name, n, block)
    kept = choose(q, k, allowed).expand(2 * groups, HEADS).dense()
    masks = allowed.dense()[:, 0]
    for s in range(2 * groups):
        for h in range(HEADS):
            expected = told(PATTERNS[name])(choose, q[s, h], k[s, h], masks[s % groups], block)
            assert torch.equal(kept[s, h], expected)


@pytest.mark.parametrize("name", named("chosen"))
def test_a_batch_equals_its_singles_and_padding_has_no_effect(name):
    n, block, groups = 24, 4, 3
    allowed = padded(groups, n, block)
    q, k = draw(groups, HEADS, n, WIDTH), draw(groups, HEADS, n, WIDTH, seed=1)
    choose = chosen_by(name, n, block)
    together = choose(q, k, allowed).expand(groups, HEADS).dense()
    for g in range(groups):
        single = Support.from_mask(allowed.dense()[g : g + 1], (block, block))
        junk = ~allowed.attended()[g, 0][:, None]
        poisoned = (x[g : g + 1].masked_fill(junk, 50.0) for x in (q, k))
        assert torch.equal(choose(*poisoned, single).expand(1, HEADS).dense()[0], together[g])


@pytest.mark.parametrize("level", ["block", "token"])
def test_topk_gives_ties_to_the_lower_index_and_all_of_them_at_ratio_one(level):
    q, k, block = draw(1, 1, 24, WIDTH), torch.ones(1, 1, 24, WIDTH, dtype=torch.float64), 4
    allowed = Support.full(24, 24, (block, block))
    some = build({"kind": "topk", "ratio": 0.5, "level": level}).chooser(setting(24, block, 1))(q, k, allowed)
    assert torch.equal(some.dense()[0, 0], (torch.arange(24) < 12).expand(24, 24))
    every = build({"kind": "topk", "ratio": 1.0, "level": level}).chooser(setting(24, block, 1))(q, k, allowed)
    assert (every.table == ALL).all()


def test_topk_of_tokens_sees_no_future_where_causal_allows_none():
    place = scene(Grid(4, 2, 2))
    allowed = place.support(build({"kind": "causal"}))
    choose = build({"kind": "topk", "level": "token"}).chooser(setting(16, place.block, 1))
    q, k = draw(1, 1, 16, WIDTH), draw(1, 1, 16, WIDTH, seed=1)
    later = place.where[:, 0] > 1
    changed = (torch.where(later[:, None], draw(1, 1, 16, WIDTH, seed=9), x) for x in (q, k))
    before, after = (choose(*x, allowed).dense()[0, 0, ~later] for x in ((q, k), tuple(changed)))
    assert torch.equal(before, after) and not before[:, later].any()


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.7])
def test_entropy_holds_the_mean_and_gives_more_blocks_where_scores_are_spread(ratio):
    n, block = 160, 4
    sharpness = torch.linspace(0, 6, n, dtype=torch.float64)[:, None]
    q, k = draw(2, HEADS, n, WIDTH) * sharpness, draw(2, HEADS, n, WIDTH, seed=1)
    choose = build({"kind": "entropy", "ratio": ratio}).chooser(setting(n, block))
    counts = choose(q, k, Support.full(n, n, (block, block))).counts.double()  # [S, heads, query blocks]
    torch.testing.assert_close(counts.mean(-1) / 40, torch.full((2, HEADS), ratio).double(), rtol=0.02, atol=0)
    assert counts.min() >= 1 and counts.max() <= 40
    assert (counts[..., :10].mean(-1) > counts[..., -10:].mean(-1)).all()


def ragged(n, block):
    return Support.full(n, n, (block, block))


def neighbours(n, block):
    """Within 40 places, as `local` leaves them."""
    near = (torch.arange(n)[:, None] - torch.arange(n)).abs() <= 40
    return Support.from_mask(near[None, None], (block, block))


def past(n, block):
    """What `causal` leaves of frames of one block. The config refuses it beside entropy, which looks at all queries."""
    number = torch.arange(n) // block
    return Support.from_mask((number <= number[:, None])[None, None], (block, block))


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.7])
@pytest.mark.parametrize("make", [ragged, neighbours, past, lambda n, block: padded(1, n + 20, block)])
@pytest.mark.parametrize("n", [200, 201, 203])
def test_entropy_holds_its_share_of_what_is_allowed(n, make, ratio):
    """Within 2 % of the allowed pairs of blocks, and of places where blocks are whole. A ragged last block counts as one,
    and may be kept more or less often than others: of places within 8 %, one of 51 blocks being ragged."""
    block = 4
    allowed = make(n, block)
    q, k = draw(2, HEADS, allowed.queries, WIDTH), draw(2, HEADS, allowed.keys, WIDTH, seed=1)
    kept = build({"kind": "entropy", "ratio": ratio}).chooser(setting(n, block))(q, k, allowed)
    blocks = kept.kept.sum((-2, -1)) / allowed.kept.sum()
    torch.testing.assert_close(blocks, torch.full_like(blocks, ratio), rtol=0.02, atol=0)
    places = kept.expand(2, HEADS).dense().sum((-2, -1)) / allowed.dense().sum()
    whole = n % block == 0 and make is ragged
    torch.testing.assert_close(places, torch.full_like(places, ratio), rtol=0.02 if whole else 0.08, atol=0)


@pytest.mark.parametrize("n", [1, 3, 7, 13, 29, 39])
def test_entropy_of_short_sequences_keeps_the_nearest_whole_number_and_a_block_a_row(n):
    block, ratio = 4, 0.1
    q, k = draw(2, HEADS, n, WIDTH), draw(2, HEADS, n, WIDTH, seed=1)
    kept = build({"kind": "entropy", "ratio": ratio}).chooser(setting(n, block))(q, k, ragged(n, block)).kept
    blocks = -(-n // block)
    # Below 10 blocks one for each row is more than the share.
    assert (kept.sum((-2, -1)) == max(blocks, round(ratio * blocks**2))).all()
    assert (kept.sum(-1) >= 1).all()


@pytest.mark.parametrize("method", ["kmeans", "lsh"])
def test_clusters_follow_a_permutation_and_one_cluster_is_full(method):
    n, block = 30, 4
    q, k = draw(1, HEADS, n, WIDTH), draw(1, HEADS, n, WIDTH, seed=1)
    allowed = Support.full(n, n, (block, block))

    def mask(q, k, **keys):
        return build({"kind": "cluster", "method": method, **keys}).chooser(setting(n, block))(q, k, allowed).dense()

    assert mask(q, k, clusters=1).all()
    every = build({"kind": "cluster", "method": method, "clusters": 1}).chooser(setting(n, block))(q, k, allowed)
    assert (every.table == ALL).all()
    a, b = torch.randperm(n), torch.randperm(n)
    plain, mixed = mask(q, k, clusters=5), mask(q[:, :, a], k[:, :, b], clusters=5)
    assert torch.equal(plain[:, :, a][..., b], mixed)
    assert plain.any(-1).all() and not plain.all()
    assert mask(q, k, clusters=5, neighbours=4).all()


def test_kmeans_finds_what_is_plainly_there():
    centres = torch.eye(3, WIDTH, dtype=torch.float64)
    label = torch.arange(30) % 3
    q, k = (centres[label] + 0.05 * draw(1, 1, 30, WIDTH, seed=s) for s in (0, 1))
    choose = build({"kind": "cluster", "clusters": 3}).chooser(setting(30, 4, 1))
    assert torch.equal(choose(q, k, Support.full(30, 30, (4, 4))).dense()[0, 0], label[:, None] == label)


def blobs(n, clusters, seed):
    """Points about `clusters` axes, which take turns."""
    label = torch.arange(n) % clusters
    return torch.eye(clusters, WIDTH, dtype=torch.float64)[label] + 0.05 * draw(2, HEADS, n, WIDTH, seed=seed)


@pytest.mark.parametrize("places, neighbours, most", [(256, 0, 0.25), (250, 0, 0.35), (256, 1, 0.6)])
def test_clusters_are_sorted_into_few_blocks(places, neighbours, most):
    """4 clusters of 64 tokens in blocks of 16 fill a quarter of the blocks, and little more where they meet in one."""
    clusters, block = 4, 16
    q, k, allowed = blobs(places, clusters, 0), blobs(places, clusters, 1), Support.full(places, places, (block, block))
    pattern = build({"kind": "cluster", "clusters": clusters, "neighbours": neighbours})
    support = pattern.chooser(setting(places, block))(q, k, allowed)
    of_places, of_blocks = support.density()
    shares = pattern.shares(setting(places, block))
    assert of_places == pytest.approx(shares[0], abs=0.01)
    assert of_blocks <= most and of_blocks <= shares[1] + 0.05
    assert support.unordered().density()[1] == 1.0


def test_sorting_by_cluster_looks_at_no_pair_outside_its_blocks():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    n, block = 2000, 16
    q, k, allowed = blobs(n, 4, 0), blobs(n, 4, 1), Support.full(n, n, (block, block))
    with Largest() as largest:
        support = build({"kind": "cluster", "clusters": 4}).chooser(setting(n, block))(q, k, allowed)
    assert support.is_ordered and len(support.bits) > 0
    assert largest.numel < 2 * HEADS * n * n / 10


def test_clusters_keep_the_order_where_a_fixed_pattern_hides_pairs_and_padding_does_not():
    place = scene(Grid(3, 4, 5), order="tile")
    choose = build({"kind": "cluster", "clusters": 3}).chooser(setting(place.places, place.block, 1))
    q, k = draw(1, 1, place.places, WIDTH), draw(1, 1, place.places, WIDTH, seed=1)
    full, local = (place.support(build(PATTERNS[name])) for name in ("full", "local"))
    free, bound = choose(q, k, full), choose(q, k, local)
    assert not place.filled.all() and free.is_ordered and not bound.is_ordered
    assert torch.equal(bound.dense(), free.dense() & local.dense())
    padding = ~place.filled[free.key_order[0, 0]]
    assert padding[place.filled.sum() :].all(), "keys that nobody attends come last"


def test_centroids_to_spare_stay_on_the_points_where_they_began():
    points = torch.eye(2, WIDTH, dtype=torch.float64)[torch.arange(10) % 2][None]
    centroids = spherical_kmeans(points, torch.ones(1, 10, dtype=torch.bool), 4, 3)
    assert centroids.shape == (1, 4, WIDTH)
    assert ((centroids[:, :, None] == points[:, None]).all(-1).any(-1)).all()


def test_the_learned_scorer_is_trained_through_its_choice_and_changes_no_value():
    n, block = 24, 4
    choose = chosen_by("learned", n, block)
    q, k, v = (draw(2, HEADS, n, WIDTH, seed=s).requires_grad_() for s in range(3))
    support = choose(q, k, Support.full(n, n, (block, block)))
    assert support.bias.shape == support.table.shape and not support.bias.any()
    bias = support.bias.repeat_interleave(block, 2).repeat_interleave(block, 3)
    scores = (q @ k.transpose(-1, -2) * WIDTH**-0.5 + bias).masked_fill(~support.dense(), -1e300)
    loss = ((scores.softmax(-1) @ v) ** 2).sum()
    for weight in torch.autograd.grad(loss, list(choose.parameters()), retain_graph=True):
        assert (weight != 0).any() and weight.isfinite().all()
    assert all(x is None for x in torch.autograd.grad(support.bias.sum(), [q, k], allow_unused=True))


def test_gumbel_noise_samples_the_blocks_of_a_step_in_training_alone():
    n, block = 24, 4
    torch.manual_seed(1)
    choose = build({"kind": "learned", "ratio": 0.4, "gumbel": 2.0}).chooser(setting(n, block)).double()
    q, k = draw(3, HEADS, n, WIDTH), draw(3, HEADS, n, WIDTH, seed=1)
    allowed = Support.full(n, n, (block, block))

    def at(step, q=q, k=k):
        choose.at_step(step)
        return choose(q, k, allowed).kept

    first, again, later = at(0), at(0), at(1)
    assert torch.equal(first, again) and not torch.equal(first, later)
    assert torch.equal(at(1, q[1:2], k[1:2])[0], later[1])  # a batch is its singles
    assert (first.sum(-1) == 2).all()  # floor(0.4 * 6)
    shares = torch.stack([at(step) for step in range(100)]).double().mean(0)
    choose.eval()
    plain = build({"kind": "learned", "ratio": 0.4}).chooser(setting(n, block)).double()
    plain.load_state_dict(choose.state_dict())
    assert torch.equal(at(0), plain(q, k, allowed).kept) and torch.equal(at(7), at(8))
    assert shares.min() > 0 and shares.max() < 1  # every block is tried
    best, rest = shares[at(0)], shares[~at(0)]
    assert best.mean() > rest.mean()  # and the better the more often


def test_gumbel_noise_draws_by_the_softmax_of_the_scores():
    """The best of a row under noise of scale 1 is block j with the probability of the softmax (the Gumbel-max trick)."""
    n, block = 12, 4
    torch.manual_seed(1)
    choose = build({"kind": "learned", "ratio": 0.1, "gumbel": 1.0, "width": 3}).chooser(setting(n, block, 1)).double()
    q, k, allowed = 2 * draw(1, 1, n, WIDTH), 2 * draw(1, 1, n, WIDTH, seed=1), Support.full(n, n, (block, block))
    means_q, means_k = (x[0, 0].unflatten(0, (3, block)).mean(1) for x in (q, k))
    scores = (means_q @ choose.to_q.weight.T) @ (means_k @ choose.to_k.weight.T).T * 3**-0.5
    taken = torch.zeros(3, 3, dtype=torch.float64)
    for step in range(400):
        choose.at_step(step)
        taken += choose(q, k, allowed).kept[0, 0]
    torch.testing.assert_close(taken / 400, scores.softmax(-1).detach(), rtol=0, atol=0.08)
    noise = choose.noise(torch.zeros(1, 1, 200, 200, dtype=torch.float64))  # mean and spread of a Gumbel distribution
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.03)
    assert float(noise.std()) == pytest.approx(math.pi / 6**0.5, abs=0.03)


# ------------------------------------------------------------------------------------------------------------- remade


def mixer_of(config, n, block):
    torch.manual_seed(1)
    module = build(config).mixer(setting(n, block)).double()
    for weight in module.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    return module


@pytest.mark.parametrize("tokens", ["all", "some"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", named("remade"))
def test_a_remade_pattern_is_its_oracle_in_values_and_gradients(name, grid, tokens):
    config, place = PATTERNS[name], scene(grid)
    n, block = place.places, place.block
    if tokens == "some":
        place = replace(place, filled=torch.arange(n) < max(1, n - block - 1))
    module, near = mixer_of(config, n, block), build(config).near
    allowed = place.support(build({"kind": "full"}))
    close = None if near is None else place.support(near)
    q, k, v = (draw(2, HEADS, n, WIDTH, seed=s).requires_grad_() for s in range(3))
    ours = module(q, k, v, allowed, attend, close)
    mask = None if close is None else close.dense()[0, 0]
    plain = told(config)(module, q, k, v, place.filled, block, attend_mask, mask)
    weights, given = draw(2, HEADS, n, WIDTH, seed=4), [q, k, v, *module.parameters()]
    weights = weights * place.filled[:, None]  # what stands in padding is dropped
    torch.testing.assert_close(ours * place.filled[:, None], plain * place.filled[:, None], rtol=0, atol=1e-12)
    gradients = (torch.autograd.grad((x * weights).sum(), given, allow_unused=True) for x in (ours, plain))
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None) or not (a if b is None else b).any()
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", named("remade"))
def test_groups_of_a_batch_have_padding_of_their_own_without_effect(name):
    n, block = 21, 4
    module = mixer_of(PATTERNS[name], n, block)
    near = padded(3, n, block) if build(PATTERNS[name]).near else None
    q, k, v = (draw(6, HEADS, n, WIDTH, seed=s) for s in range(3))
    together = module(q, k, v, padded(3, n, block), attend, near)
    for s in range(6):
        single = Support.from_mask(padded(3, n, block).dense()[s % 3][None], (block, block))
        filled = single.attended()[0, 0]
        poisoned = (x[s : s + 1].masked_fill(~filled[:, None], 50.0) for x in (q, k, v))
        alone = module(*poisoned, single, attend, None if near is None else single)
        torch.testing.assert_close(alone[0, :, filled], together[s][:, filled], rtol=0, atol=1e-12)


def test_linformer_with_the_identity_is_full_and_refuses_another_length():
    n, block = 12, 4
    module = mixer_of({"kind": "linformer", "keys": n}, n, block)
    for weight in module.parameters():
        weight.data = torch.eye(n, dtype=torch.float64)
    q, k, v = (draw(2, HEADS, n, WIDTH, seed=s) for s in range(3))
    allowed = Support.full(n, n, (block, block))
    torch.testing.assert_close(module(q, k, v, allowed, attend), attend_mask(q, k, v, None), rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="sequences of 12 places and cannot mix 8"):
        module(q[:, :, :8], k[:, :, :8], v[:, :, :8], Support.full(8, 8, (block, block)), attend)


def test_convolution_starts_as_the_mean_and_refuses_other_blocks():
    n, block = 12, 4
    module = build({"kind": "convolution"}).mixer(setting(n, block)).double()
    q, k, v = (draw(2, HEADS, n, WIDTH, seed=s) for s in range(3))
    means = (x.unflatten(2, (3, 4)).mean(3) for x in (k, v))
    torch.testing.assert_close(
        module(q, k, v, Support.full(n, n, (4, 4)), attend), attend_mask(q, *means, None), rtol=0, atol=1e-14
    )
    with pytest.raises(ValueError, match="blocks of 4 places, not of 3"):
        module(q, k, v, Support.full(n, n, (3, 3)), attend)


@pytest.mark.parametrize("blocks", [2, 8, 64])
def test_sinkhorn_matrices_have_columns_of_one_and_nearly_rows(blocks):
    matrix = sinkhorn(0.5 * draw(20, blocks, blocks), 8)
    assert (matrix.sum(-2) - 1).abs().max() < 1e-12
    assert (matrix.sum(-1) - 1).abs().max() < 1e-3


def test_sinkhorn_logs_its_residual_and_large_scores_stay_finite():
    module = mixer_of({"kind": "sinkhorn", "temperature": 1e-3, "iterations": 2}, 24, 4)
    q, k, v = (draw(2, HEADS, 24, WIDTH, seed=s).requires_grad_() for s in range(3))
    out = module(q, k, v, Support.full(24, 24, (4, 4)), attend)
    assert out.isfinite().all() and all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), [q, k, v]))
    residual = module.measured["sinkhorn_residual"]
    assert float(residual) > 0 and not residual.requires_grad
    assert not module.state_dict()


def test_the_gates_of_three_ways_are_trained_and_the_coarse_branch_trains_the_choice():
    place = scene(Grid(3, 4, 4))
    n, block = place.places, place.block
    allowed, near = place.support(build({"kind": "full"})), place.support(build({"kind": "local", "radius": 1}))
    q, k, v = (draw(1, HEADS, n, WIDTH, seed=s).requires_grad_() for s in range(3))

    def gradients(branches):
        module = build({"kind": "three_way", "branches": branches, "ratio": 0.2}).mixer(setting(n, block)).double()
        loss = module(q, k, v, allowed, attend, near)[:, :, :block].square().sum()  # of the first query block alone
        return torch.autograd.grad(loss, [k, module.gate, module.gate_bias])

    to_k, gate, bias = gradients(["compress", "select", "slide"])
    assert (gate != 0).all() and (bias != 0).all()
    assert (to_k.unflatten(2, (-1, block)).abs().sum((3, 4)) > 0).all()
    to_k, *_ = gradients(["select"])  # which alone leaves the blocks that it did not choose without a gradient
    assert (to_k.unflatten(2, (-1, block)).abs().sum((3, 4)) == 0).sum() == HEADS * 5


# --------------------------------------------------------------------------------------------------- costs and dtypes


@pytest.mark.parametrize("name", named("chosen") + named("remade"))
def test_costs_count_the_products_that_are_made(name):
    """Within 5 %: pooling and weighing are sums that PyTorch's counter leaves out. Boxes are counted as if uncut."""
    place = scene(Grid(8, 8, 8))
    n, block, pattern = place.places, place.block, build(PATTERNS[name])
    q, k, v = (draw(1, HEADS, n, 32, seed=s).float() for s in range(3))
    allowed, spent = place.support(build({"kind": "full"})), 0
    made = Setting(HEADS, 32, n, block, (2, 2, 2), 0)

    def attend_free(q, k, v, support):
        nonlocal spent
        kept = 1.0 if support is None else support.density()[0]
        spent += int(4 * kept * q.shape[2] * k.shape[2] * HEADS * 32)
        return q

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if isinstance(pattern, Chosen):
            support = pattern.chooser(made)(q, k, allowed)
            expected = pattern.choosing_flops(made)
            assert support.density()[0] == pytest.approx(pattern.shares(made)[0], rel=0.15)
        else:
            near = None if pattern.near is None else place.support(pattern.near)
            pattern.mixer(made)(q, k, v, allowed, attend_free, near)
            expected = pattern.flops(made)
    slack = 0.2 if isinstance(pattern, Remade) and pattern.near is not None else 0.05
    assert expected == pytest.approx(counter.get_total_flops() + spent, rel=slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", named("chosen") + named("remade"))
def test_patterns_take_every_dtype(name, dtype):
    n, block = 21, 4
    pattern = build(PATTERNS[name])
    allowed = Support.full(n, n, (block, block))
    q, k, v = (draw(2, HEADS, n, WIDTH, seed=s).to(dtype) for s in range(3))
    if isinstance(pattern, Remade):
        out = pattern.mixer(setting(n, block))(q, k, v, allowed, attend, allowed)
        assert out.dtype == dtype and out.isfinite().all()
    else:
        assert pattern.chooser(setting(n, block))(q, k, allowed).expand(2, HEADS).kept.any(-1).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_are_the_same_on_a_gpu(name):
    pattern, place = build(PATTERNS[name]), scene(Grid(3, 4, 5), order="tile")
    n, block = place.places, place.block
    if isinstance(pattern, Fixed):
        assert torch.equal(place.support(pattern, "cuda").dense().cpu(), place.support(pattern).dense())
        return
    tensors = [draw(2, HEADS, n, WIDTH, seed=s) for s in range(3)]
    torch.manual_seed(0)
    module = pattern.chooser(setting(n, block)) if isinstance(pattern, Chosen) else pattern.mixer(setting(n, block))
    results = []
    for device in ("cpu", "cuda"):
        allowed = place.support(build({"kind": "full"}), device)
        q, k, v = (x.to(device) for x in tensors)
        if isinstance(module, torch.nn.Module):
            module = module.to(device, torch.float64)
        if isinstance(pattern, Chosen):
            results.append(module(q, k, allowed).expand(2, HEADS).dense().cpu())
        else:
            results.append(module(q, k, v, allowed, attend, allowed).cpu())
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
