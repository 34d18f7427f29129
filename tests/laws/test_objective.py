"""The equations of the objective, each against its definition."""

import pytest
import torch
from diffusers import DDPMScheduler

from stgen.objective import Objective, flow_noise, flow_velocity_from_sample, min_snr_weight, shift_time

X, NOISE = torch.randn(2, 4, 3, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
T = torch.tensor([0.1, 0.3, 0.6, 0.95], dtype=torch.float64)


def column(t):
    return t.view(-1, 1, 1, 1, 1)


def test_flow_runs_straight_from_data_to_noise():
    torch.testing.assert_close(flow_noise(X, NOISE, torch.zeros(4)), X)
    torch.testing.assert_close(flow_noise(X, NOISE, torch.ones(4)), NOISE)
    torch.testing.assert_close(flow_noise(X, NOISE, T), (1 - column(T)) * X + column(T) * NOISE)


def test_flow_velocity_is_the_derivative_of_the_path_and_follows_from_the_sample():
    h = 1e-6
    derivative = (flow_noise(X, NOISE, T + h) - flow_noise(X, NOISE, T - h)) / (2 * h)
    torch.testing.assert_close(derivative, NOISE - X, rtol=0, atol=1e-8)
    z = flow_noise(X, NOISE, T)
    torch.testing.assert_close(flow_velocity_from_sample(X, z, T), NOISE - X, rtol=0, atol=1e-12)


def test_the_right_prediction_has_no_loss_and_a_wrong_one_the_velocitys():
    velocity = Objective()
    assert velocity.loss(NOISE - X, X, NOISE, T).abs().max() < 1e-12
    sample = Objective(prediction_type="sample")
    assert sample.loss(X, X, NOISE, T).abs().max() < 1e-12
    error = torch.randn_like(X)
    by_sample = sample.loss((X + error).float(), X, NOISE, T)
    by_velocity = velocity.loss(NOISE - X - error / column(T), X, NOISE, T)
    torch.testing.assert_close(by_sample, by_velocity, rtol=1e-5, atol=1e-6)


def test_the_weight_of_data_prediction_is_held_below_the_smallest_time():
    error = torch.ones(1, 1, 1, 1, 1)
    losses = [
        Objective(prediction_type="sample").loss(error, 0 * error, error, torch.tensor([t])) for t in (1e-4, 0.05)
    ]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[1], torch.tensor([400.0]))


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_diffusion_agrees_with_diffusers(schedule, prediction):
    ours = Objective(path="diffusion", prediction_type=prediction, beta_schedule=schedule)
    theirs = DDPMScheduler(num_train_timesteps=1000, beta_schedule=schedule)
    steps = (T * 1000).long()
    assert ours.model_time(T).tolist() == steps.tolist()
    z = ours.add_noise(X, NOISE, T)
    torch.testing.assert_close(z, theirs.add_noise(X, NOISE, steps), rtol=0, atol=1e-6)
    target = {"epsilon": NOISE, "sample": X, "v_prediction": theirs.get_velocity(X, NOISE, steps)}[prediction]
    assert ours.loss(target.double(), X, NOISE, T).max() < 1e-10
    assert ours.loss(target.double() + 1, X, NOISE, T).min() > 0.5


def test_min_snr_weights():
    snr = torch.tensor([0.5, 5.0, 50.0])
    torch.testing.assert_close(min_snr_weight(snr, 5.0, "epsilon"), torch.tensor([1.0, 1.0, 0.1]))
    torch.testing.assert_close(min_snr_weight(snr, 5.0, "sample"), torch.tensor([0.5, 5.0, 5.0]))
    torch.testing.assert_close(min_snr_weight(snr, 5.0, "v_prediction"), torch.tensor([0.5 / 1.5, 5 / 6, 5 / 51]))
    weighted = Objective(path="diffusion", prediction_type="epsilon", snr_gamma=5.0)
    plain = Objective(path="diffusion", prediction_type="epsilon")
    ratio = weighted.loss(NOISE + 1, X, NOISE, T) / plain.loss(NOISE + 1, X, NOISE, T)
    assert ratio[0] < 0.2 and abs(float(ratio[-1]) - 1) < 1e-9


def test_min_snr_weighs_equal_errors_of_the_data_alike_whatever_is_predicted():
    """An error d of x is d a / s of noise and d / s of v: the weighted losses must be one and the same."""
    a2 = torch.tensor([0.9, 0.5, 0.1])
    snr = a2 / (1 - a2)
    by_sample = min_snr_weight(snr, 5.0, "sample")
    by_noise = min_snr_weight(snr, 5.0, "epsilon") * snr
    by_v = min_snr_weight(snr, 5.0, "v_prediction") / (1 - a2)
    torch.testing.assert_close(by_noise, by_sample)
    torch.testing.assert_close(by_v, by_sample)


def test_shift_keeps_the_ends_and_composes():
    t = torch.linspace(0, 1, 11)
    shifted = shift_time(t, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted[1:-1] > t[1:-1]).all()
    torch.testing.assert_close(shift_time(shift_time(t, 3.0), 2.0), shift_time(t, 6.0))


def quantile(objective, level):
    return float(objective.draw_times(20_000, torch.Generator().manual_seed(0)).quantile(level))


def test_time_densities():
    assert abs(quantile(Objective(timestep_density="uniform"), 0.25) - 0.25) < 0.01
    sigmoid = 1 / (1 + 2.71828**0.6745)  # the lower quartile of a standard normal is -0.6745
    assert abs(quantile(Objective(timestep_density="logit_normal"), 0.25) - sigmoid) < 0.01
    assert abs(quantile(Objective(timestep_density="logit_normal", logit_mean=1.0), 0.5) - 0.731) < 0.01
    assert abs(quantile(Objective(timestep_density="mode", mode_scale=1.29), 0.5) - 0.5) < 0.2
    assert abs(quantile(Objective(timestep_density="uniform", shift=3.0), 0.5) - 0.75) < 0.01
    for density in ("uniform", "logit_normal", "mode"):
        times = Objective(timestep_density=density).draw_times(5000, torch.Generator().manual_seed(1))
        assert times.min() > 0 and times.max() < 1
