"""Distances against closed forms, what changes in a clip, and features that say what they are."""

import math

import pytest
import torch
from torch import nn

from stgen.metrics import temporal
from stgen.metrics.distances import frechet, frechet_of_gaussians, mmd, nearest
from stgen.metrics.features import FeatureError, open_features

F64 = torch.float64


def gaussians(d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A mean and a covariance."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(d, d, generator=g, dtype=F64)
    return torch.randn(d, generator=g, dtype=F64), a @ a.T / d + 0.1 * torch.eye(d, dtype=F64)


def clip(seed: int = 0, frames: int = 6, height: int = 20, width: int = 24) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (frames, 3, height, width), generator=g, dtype=torch.uint8)


# ------------------------------------------------------------------------------------------------------ Fréchet distance


def test_frechet_of_diagonal_gaussians_is_that_of_their_roots():
    mean_a, mean_b = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([3.0, 1.0, 0.5])
    a, b = torch.tensor([4.0, 1.0, 0.25]), torch.tensor([1.0, 9.0, 0.0])
    expected = float((mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert frechet_of_gaussians(mean_a, a.diag(), mean_b, b.diag()) == pytest.approx(expected, rel=1e-12)


def test_frechet_of_gaussians_that_do_not_commute():
    """In two dimensions tr (AB)^(1/2) = (tr AB + 2 det(AB)^(1/2))^(1/2)."""
    (mean_a, a), (mean_b, b) = gaussians(2, 1), gaussians(2, 2)
    assert not torch.allclose(a @ b, b @ a)
    root = ((a @ b).trace() + 2 * torch.linalg.det(a @ b).sqrt()).sqrt()
    expected = float((mean_a - mean_b).square().sum() + a.trace() + b.trace() - 2 * root)
    assert frechet_of_gaussians(mean_a, a, mean_b, b) == pytest.approx(expected, rel=1e-10)


def test_frechet_is_symmetric_and_does_not_depend_on_the_axes():
    (mean_a, a), (mean_b, b) = gaussians(7, 3), gaussians(7, 4)
    turn = torch.linalg.qr(gaussians(7, 5)[1]).Q
    first = frechet_of_gaussians(mean_a, a, mean_b, b)
    assert first == pytest.approx(frechet_of_gaussians(mean_b, b, mean_a, a), rel=1e-9)
    turned = frechet_of_gaussians(turn @ mean_a, turn @ a @ turn.T, turn @ mean_b, turn @ b @ turn.T)
    assert first == pytest.approx(turned, rel=1e-9)


def test_frechet_of_sets():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 8, generator=g)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet(x, x + 3) == pytest.approx(8 * 9, rel=1e-5)  # the means alone differ
    # More features than clips: covariances have no inverse, and the closed form of scaled sets holds all the same.
    few = torch.randn(5, 40, generator=g, dtype=F64)
    centred = few - few.mean(0)
    assert frechet(centred, 2 * centred) == pytest.approx(float(torch.cov(centred.T).trace()), rel=1e-5)


def test_features_of_one_clip_are_refused():
    with pytest.raises(ValueError, match="at least two clips"):
        frechet(torch.zeros(1, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="at least two clips"):
        mmd(torch.zeros(5, 3), torch.zeros(1, 3))


# ------------------------------------------------------------------------------------------------------------------- MMD


@pytest.mark.parametrize("kernel", ["polynomial", "rbf"])
def test_mmd_is_the_mean_over_pairs(kernel):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 3, generator=g, dtype=F64), torch.randn(6, 3, generator=g, dtype=F64) + 1
    width = float(torch.pdist(b).median())

    def k(x, y):
        return (
            (float(x @ y) / 3 + 1) ** 3
            if kernel == "polynomial"
            else math.exp(-(float((x - y).norm()) ** 2) / 2 / width**2)
        )

    def pairs(x):
        return sum(k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j) / len(x) / (len(x) - 1)

    cross = sum(k(x, y) for x in a for y in b) / len(a) / len(b)
    assert mmd(a, b, kernel) == pytest.approx(pairs(a) + pairs(b) - 2 * cross, rel=1e-9)


@pytest.mark.parametrize("kernel", ["polynomial", "rbf"])
def test_mmd_is_unbiased(kernel):
    """Over many pairs of small sets of one distribution the mean is 0 within its error; of two it is not."""
    g = torch.Generator().manual_seed(0)
    same = torch.tensor([mmd(*torch.randn(2, 6, 4, generator=g, dtype=F64), kernel) for _ in range(600)])
    error = float(same.std()) / len(same) ** 0.5
    assert abs(float(same.mean())) < 3.5 * error
    assert same.min() < 0 < same.max()
    other = [mmd(torch.randn(6, 4, generator=g) + 1.5, torch.randn(6, 4, generator=g), kernel) for _ in range(50)]
    assert sum(other) / len(other) > 20 * error


def test_mmd_of_a_set_with_itself_is_not_above_zero():
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    assert -0.2 < mmd(x, x, "rbf") <= 0  # the diagonal counts in the cross term alone
    still = torch.ones(5, 3)
    assert mmd(still, still, "rbf") == pytest.approx(0, abs=1e-12)


# --------------------------------------------------------------------------------------------------------------- nearest


def test_nearest_of_a_member_is_exactly_zero():
    g = torch.Generator().manual_seed(0)
    references = torch.rand(300, 999, generator=g) * 255
    queries = torch.cat([references[[7, 250]], references[3:4] + 2])
    found = nearest(queries, references)
    assert found[:2].tolist() == [0, 0]
    assert float(found[2]) == pytest.approx(2, rel=1e-6)


# -------------------------------------------------------------------------------------------------------- changes in time


def test_a_still_clip_neither_changes_nor_flickers():
    still = clip()[:1].expand(6, -1, -1, -1)
    assert (temporal.change(still), temporal.flicker(still), temporal.consistency(still)) == (0, 0, pytest.approx(1))
    black = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    assert temporal.consistency(black) == 1


def test_even_brightening_changes_but_does_not_flicker():
    frames = torch.arange(0, 60, 10, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    assert (temporal.change(frames), temporal.flicker(frames)) == (10, 0)


def test_alternating_flickers_twice_as_much_as_it_changes():
    frames = torch.tensor([10, 40] * 3, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    assert (temporal.change(frames), temporal.flicker(frames)) == (30, 60)


def test_noise_is_not_consistent_and_its_negative_is_the_opposite():
    assert abs(temporal.consistency(clip(height=64, width=64))) < 0.05
    one = clip(frames=1)
    assert temporal.consistency(torch.cat([one, 255 - one])) == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("measure", [temporal.change, temporal.flicker])
def test_a_single_frame_does_not_change(measure):
    assert measure(clip(frames=1)) == 0 and measure(clip(frames=2)) >= 0
    assert temporal.consistency(clip(frames=1)) == 1


# -------------------------------------------------------------------------------------------------------------- features


def test_random_features_are_the_same_every_time_and_see_motion():
    first, again = open_features("random"), open_features("random")
    clips = [clip(i) for i in range(3)]
    torch.manual_seed(1)
    assert torch.equal(first(clips), again(clips)) and first(clips).shape == (3, 96)
    assert first.sha256 == again.sha256 and not first.fvd and "random" in first.name
    still = [one[:1].expand_as(one) for one in clips]
    assert not torch.allclose(first(clips), first(still))


def test_features_do_not_depend_on_the_batch():
    features, clips = open_features("random"), [clip(i) for i in range(19)]
    assert torch.allclose(features(clips)[17:], features(clips[17:]), atol=1e-6)


def test_codec_features_are_moments_of_the_latents():
    found = open_features("codec", lambda x: x[:, :2])([clip()])
    x = (clip().double() / 127.5 - 1).movedim(0, 1)[:2]  # [C, T, H, W]
    over_space = x.flatten(2).std(2, correction=0).mean(1)
    over_time = x.flatten(2).std(1, correction=0).mean(1)
    assert torch.allclose(found[0], torch.cat([x.mean((1, 2, 3)), over_space, over_time]), atol=1e-5)


class Small(nn.Module):
    def forward(self, x):
        return x.mean((3, 4))


class Stand(nn.Module):
    """Takes what the published I3D takes."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
        return x.mean((1, 2, 3, 4))[:, None].expand(-1, self.width)


def test_torchscript_from_a_file_is_never_called_fvd(tmp_path):
    path = tmp_path / "small.pt"
    torch.jit.script(Small()).save(str(path))
    features = open_features(str(path))
    assert features([clip()]).shape == (1, 3 * 6)
    assert not features.fvd and "small.pt" in features.name and len(features.sha256) == 64


class Long(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv3d(3, 2, (10, 1, 1))

    def forward(self, x):
        return self.convolution(x).mean((3, 4))


def test_clips_that_a_network_cannot_take_are_told_in_one_line(tmp_path):
    torch.jit.script(Long()).save(str(tmp_path / "long.pt"))
    features = open_features(str(tmp_path / "long.pt"))
    assert features([clip(frames=10)]).shape == (1, 2)
    with pytest.raises(FeatureError, match="does not take 6 frames of 20x24") as error:
        features([clip(frames=6)])
    assert "\n" not in str(error.value)


def test_only_what_behaves_as_i3d_may_be_called_fvd(tmp_path):
    for width in (400, 10):
        torch.jit.script(Stand(width)).save(str(tmp_path / f"{width}.pt"))
    torch.jit.script(Small()).save(str(tmp_path / "small.pt"))
    assert open_features(f"i3d:{tmp_path / '400.pt'}").fvd
    with pytest.raises(FeatureError, match="gives 10 features where I3D gives 400"):
        open_features(f"i3d:{tmp_path / '10.pt'}")
    with pytest.raises(FeatureError, match="not the TorchScript of I3D"):
        open_features(f"i3d:{tmp_path / 'small.pt'}")


def test_a_network_of_torchvision_with_random_weights_and_with_those_of_a_file(tmp_path):
    from torchvision.models import get_model

    random = open_features("r3d_18")
    assert random.weights == "random, seed 0" and not random.fvd
    found = random([clip(frames=4)])
    assert found.shape == (1, 512)
    torch.manual_seed(5)
    torch.save(get_model("r3d_18", weights=None).state_dict(), tmp_path / "w.pth")
    other = open_features(f"r3d_18:{tmp_path / 'w.pth'}")
    assert other.weights == "w.pth" and not torch.allclose(other([clip(frames=4)]), found)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("inception", "is none of random, codec"),
        ("codec", "needs the codec of a run"),
        ("absent.pt", "there is no file absent.pt"),
        ("r3d_18:absent.pth", "absent.pth holds no weights"),
    ],
)
def test_features_that_cannot_be_had_are_told_in_one_line(which, message):
    with pytest.raises(FeatureError, match=message) as error:
        open_features(which)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_torchscript(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"nothing of the kind")
    with pytest.raises(FeatureError, match="cannot be loaded as TorchScript"):
        open_features(str(tmp_path / "x.pt"))
