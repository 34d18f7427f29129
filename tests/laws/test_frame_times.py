"""Frames of their own noise: the model's modulation, the draws and the loss, frame by frame."""

import pytest
import torch

from stgen.model import VideoTransformer
from stgen.objective import Objective
from stgen.step import generator

PLANS = ["spatial temporal", "joint", "spatial>temporal", "spatial+temporal"]


def build(plan="spatial temporal", **keys):
    torch.manual_seed(0)
    model = VideoTransformer(4, (3, 2, 2), (2, 1, 1), width=16, depth=2, plan=plan, text_width=8, **keys).double()
    with torch.no_grad():  # gates and modulations away from where they start
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def inputs(batch=2):
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, 6, 2, 2, dtype=torch.float64, generator=g)
    return latents, torch.randn(batch, 5, 8, dtype=torch.float64, generator=g)


@pytest.mark.parametrize("placement", ["sequential", "parallel"])
@pytest.mark.parametrize("conditioning", ["adaln", "both"])
@pytest.mark.parametrize("plan", PLANS)
def test_equal_times_of_all_frames_are_the_time_of_the_clip(plan, conditioning, placement):
    model, (latents, text) = build(plan, conditioning=conditioning, mlp_placement=placement), inputs()
    times = torch.tensor([100.0, 700.0], dtype=torch.float64)
    whole = model(latents, times, text).sample
    torch.testing.assert_close(model(latents, times[:, None].expand(2, 6), text).sample, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("plan", ["spatial", "height width"])
def test_without_attention_over_time_each_frame_goes_by_its_own_time(plan):
    model, (latents, text) = build(plan), inputs(1)
    times = torch.tensor([[0.0, 0.0, 300.0, 300.0, 900.0, 900.0]], dtype=torch.float64)
    together = model(latents, times, text).sample
    for frame in range(0, 6, 2):
        alone = model(latents, times[:, frame], text).sample
        torch.testing.assert_close(
            together[:, :, frame : frame + 2], alone[:, :, frame : frame + 2], rtol=0, atol=1e-10
        )


def test_times_that_do_not_fit_are_refused():
    latents, text = inputs()
    with pytest.raises(ValueError, match="for 2 clips of 6 latent frames"):
        build()(latents, torch.zeros(2, 3), text)
    with pytest.raises(ValueError, match="registers: 0"):
        build(registers=2)(latents, torch.zeros(2, 6), text)


def draws(frame_times, count=400, frames=4):
    objective = Objective(frame_times=frame_times)
    return torch.stack([objective.draw_clip_times(frames, generator("test", i)) for i in range(count)])


def test_each_frame_draws_its_own_time():
    times = draws("frame")
    assert times.shape == (400, 4) and len(times.unique()) == 1600
    assert abs(torch.corrcoef(times.T) - torch.eye(4)).max() < 0.2


def test_a_clean_past_is_followed_by_one_time():
    times = draws("past")
    past = (times == 0).sum(1)
    assert torch.bincount(past, minlength=4).min() > 70 and past.max() == 3  # 0 to 3 frames about equally often
    for row, count in zip(times, past.tolist(), strict=True):
        assert (row[:count] == 0).all() and len(row[count:].unique()) == 1 and row[-1] > 0


def test_one_time_for_the_clip_is_what_it_was():
    assert draws("clip").shape == (400, 1)
    assert torch.equal(
        draws("clip")[:, 0], torch.cat([Objective().draw_times(1, generator("test", i)) for i in range(400)])
    )


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_the_loss_is_the_mean_over_the_frames_that_hold_noise(prediction):
    objective = Objective(prediction_type=prediction, frame_times="past")
    x, noise, output = torch.randn(3, 2, 4, 5, 2, 2, generator=torch.Generator().manual_seed(2)).unbind(0)
    t = torch.tensor([[0.0, 0.0, 0.6, 0.6, 0.6], [0.3, 0.1, 0.5, 0.9, 0.2]])
    z = objective.add_noise(x, noise, t)
    assert torch.equal(z[0, :, :2], x[0, :, :2])
    found = objective.loss(output, x, noise, t)
    for clip in range(2):
        frames = [f for f in range(5) if t[clip, f] > 0]
        alone = [
            objective.loss(*(a[clip : clip + 1, :, f : f + 1] for a in (output, x, noise)), t[clip, f : f + 1])
            for f in frames
        ]
        torch.testing.assert_close(found[clip], torch.cat(alone).mean())
