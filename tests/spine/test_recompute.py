"""Gradient checkpointing of a share of the layers, and layers compiled by kind."""

import pytest
import torch

from stgen import build, config, flops, schema
from stgen.model import VideoTransformer
from stgen.tokens import Grid


def model_of(share: float, depth: int = 6) -> VideoTransformer:
    torch.manual_seed(0)
    model = VideoTransformer(in_channels=3, grid=(2, 4, 4), width=16, depth=depth, heads=2, text_width=8)
    if share:
        model.enable_gradient_checkpointing()
        model.recomputed = share
    return model


def gradients(model: VideoTransformer) -> tuple[list[int], list[torch.Tensor]]:
    """How often each layer was computed, and the gradients of all weights."""
    calls = [0] * len(model.blocks)
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    for parameter in model.parameters():
        parameter.data.add_(0.01)  # gates at zero would hide the layers
    x = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    model(x, torch.tensor([300.0, 700.0]), torch.ones(2, 3, 8), return_dict=False)[0].square().sum().backward()
    return calls, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("share", "calls"),
    [(0, [1] * 6), (1.0, [2] * 6), (0.5, [1, 2] * 3), (1 / 3, [1, 1, 2, 1, 1, 2]), (0.1, [1] * 6)],
)
def test_a_share_of_the_layers_is_computed_again_and_no_gradient_changes(share, calls):
    _, expected = gradients(model_of(0))
    found, grads = gradients(model_of(share))
    assert found == calls
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True)) and len(grads) > 50


def test_the_config_says_the_share_and_the_count_of_flops_follows(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {max_train_steps: 1, gradient_checkpointing: 0.5}\nmodel: {depth: 2}\n")
    cfg = config.load(tmp_path / "a.yaml", [], schema.Config)
    parts = build.build_parts(cfg, ["a red circle"])
    assert parts.transformer.is_gradient_checkpointing and parts.transformer.recomputed == 0.5
    work = [flops.step_work(parts.transformer, Grid(2, 4, 4), 3, 8, share).executed for share in (False, 0.5, True)]
    assert work[1] - work[0] == work[2] - work[1] > 0 and work[0] * 4 == work[2] * 3


@pytest.mark.slow
def test_layers_of_one_kind_are_compiled_once_and_gradients_are_the_same():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    _, expected = gradients(model_of(0, depth=4))
    counters.clear()
    model = model_of(0, depth=4)
    model.compile_repeated_blocks(backend="aot_eager")
    _, grads = gradients(model)
    assert counters["stats"]["unique_graphs"] == 2  # spatial, temporal
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
