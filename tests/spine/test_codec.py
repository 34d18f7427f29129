"""Codecs: what is encoded comes back, latents have unit variance, and what cannot be encoded is refused in a sentence."""

import json

import huggingface_hub
import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    AutoencoderTiny,
)
from torch import nn

from stgen import codec
from stgen.codec import Autoencoder, CodecError, PatchPCA, Pixels, as_codec, load_autoencoder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def clips(count=8, frames=4, height=16, width=8, seed=0):
    """Smooth random clips [B, 3, T, H, W] in [-1, 1]."""
    noise = torch.randn(count, 3, frames, height, width, generator=torch.Generator().manual_seed(seed))
    return (nn.functional.avg_pool3d(noise, (1, 3, 3), 1, (0, 1, 1)) * 2).clamp(-1, 1)


# -------------------------------------------------------------------------------------------------------- own codecs


def test_bytes_survive_the_unit_interval():
    frames = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(codec.to_bytes(codec.to_unit(frames)), frames)
    assert codec.to_unit(frames).aminmax() == (-1, 1)
    assert codec.to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_all_components_are_the_identity():
    frames = clips()
    pca = PatchPCA((2, 2, 2), 24).fit(frames)
    latents = pca.encode(frames)
    assert latents.shape == (8, 24, 2, 8, 4) == (8, *pca.latent_shape(4, 16, 8))
    assert torch.allclose(pca.decode(latents), frames, atol=1e-5)
    assert torch.allclose(pca.basis @ pca.basis.T, torch.eye(24), atol=1e-5)


def test_truncation_loses_the_discarded_variance():
    """No linear codec of as many numbers does better (Eckart & Young)."""
    frames = clips()
    pca = PatchPCA((1, 2, 2), 5).fit(frames)
    patches = pca._patches(frames).flatten(0, 3).double()
    variances = torch.linalg.eigvalsh(torch.cov(patches.T, correction=0))  # ascending
    error = (pca.decode(pca.encode(frames)) - frames).double().square().mean() * 12
    assert float(error) == pytest.approx(float(variances[:-5].sum()), rel=1e-4)


@pytest.mark.parametrize("components", [3, 12])
def test_latents_have_unit_variance_and_keep_the_order_of_components(components):
    frames = clips()
    latents = PatchPCA((1, 2, 2), components).fit(frames).encode(frames)
    assert float(latents.square().mean()) == pytest.approx(1, abs=1e-4)
    variances = latents.movedim(1, -1).flatten(0, 3).var(0)
    assert (variances.diff() <= 1e-5).all() and variances[0] > 1.1 * variances[-1]


def test_a_clip_moved_by_a_patch_gives_latents_moved_by_one():
    frames = clips()
    pca = PatchPCA((2, 4, 2), 7).fit(frames)
    moved = pca.encode(frames.roll((2, 4, 2), (2, 3, 4)))
    assert torch.allclose(moved, pca.encode(frames).roll((1, 1, 1), (2, 3, 4)), atol=1e-6)
    alone = frames.clone()
    alone[:, :, 2:, 4:8, 2:4] = 1  # the second patch on each axis
    assert (pca.encode(alone) != pca.encode(frames)).any(1).nonzero()[:, 1:].unique(dim=0).tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("own", [lambda: PatchPCA((2, 2, 2), 6), Pixels])
def test_own_codecs_are_saved_whole(own, tmp_path):
    frames = clips()
    fitted = own().fit(frames)
    fitted.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = type(fitted).from_pretrained(tmp_path, use_safetensors=True)
    assert torch.equal(loaded.encode(frames), fitted.encode(frames))
    latents = fitted.encode(frames)
    assert torch.equal(loaded.decode(latents), fitted.decode(latents))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert as_codec(loaded) is loaded


def test_pixels_have_unit_variance():
    frames = clips() * 0.3 + 0.5
    pixels = Pixels().fit(frames)
    latents = pixels.encode(frames)
    assert latents.shape[1:] == pixels.latent_shape(4, 16, 8)
    assert float(latents.mean()) == pytest.approx(0, abs=1e-5) and float(latents.std(correction=0)) == pytest.approx(
        1, abs=1e-5
    )
    assert torch.allclose(pixels.decode(latents), frames, atol=1e-6)


def test_half_precision_takes_float_clips():
    frames = clips()
    pca = PatchPCA((1, 2, 2), 12).fit(frames).to(torch.bfloat16)
    assert torch.allclose(pca.decode(pca.encode(frames)).float(), frames, atol=0.1)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((5, 16, 8), "num_frames 5 is not divisible by the codec's patch of 2"),
        ((4, 18, 8), "height 18 is not divisible by the codec's patch of 4"),
        ((4, 16, 9), "width 9 is not divisible by the codec's patch of 2"),
        ((0, 16, 8), "num_frames 0 should be at least 1"),
    ],
)
def test_pca_refuses_sizes(size, message):
    pca = PatchPCA((2, 4, 2), 3)
    with pytest.raises(CodecError) as refusal:
        pca.latent_shape(*size)
    assert str(refusal.value) == message
    with pytest.raises(CodecError):
        pca.encode(torch.zeros(1, 3, *size))


def test_pca_refuses_too_few_patches():
    with pytest.raises(
        CodecError, match=r"codec\.components 24 needs at least as many patches to fit, found 8; add videos"
    ):
        PatchPCA((2, 2, 2), 24).fit(torch.zeros(1, 3, 4, 4, 4))


def test_pca_of_a_still_grey_folder_is_finite():
    frames = torch.zeros(2, 3, 4, 8, 8)
    pca = PatchPCA((1, 2, 2), 12).fit(frames)
    assert torch.equal(pca.decode(pca.encode(frames)), frames)


# ---------------------------------------------------------------------------------------------- diffusers autoencoders


def kl(**options):
    options = {"scaling_factor": 0.5, "shift_factor": 0.25, **options}
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    return AutoencoderKL(
        block_out_channels=(8, 16), latent_channels=4, layers_per_block=1, norm_num_groups=4, **blocks, **options
    )


def wan():
    statistics = dict(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 2.0, 1.5, 1.0])
    downs = [False, True, True]
    return AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1, temperal_downsample=downs, **statistics)


def ltx(**options):
    model = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), spatio_temporal_scaling=(True, False), patch_size=4,
        decoder_spatio_temporal_scaling=(True, False), decoder_inject_noise=(False, False, False),
        down_block_types=("LTXVideoDownBlock3D",) * 2, upsample_residual=(False, False), upsample_factor=(1, 1),
        scaling_factor=0.5, **options,
    )  # fmt: skip
    model.latents_mean.copy_(torch.linspace(-1, 1, 8))
    model.latents_std.copy_(torch.linspace(0.5, 2, 8))
    return model


def cogvideox():
    blocks = dict(down_block_types=("CogVideoXDownBlock3D",) * 2, up_block_types=("CogVideoXUpBlock3D",) * 2)
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2, scaling_factor=0.7,
        temporal_compression_ratio=4, **blocks,
    )  # fmt: skip


def dc():
    blocks = dict(encoder_block_types="ResBlock", decoder_block_types="ResBlock")
    sizes = dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), scaling_factor=0.6)
    depths = dict(encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1))
    return AutoencoderDC(latent_channels=4, encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
                         **blocks, **sizes, **depths)  # fmt: skip


def tiny():
    depths = dict(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), latent_channels=4, **depths
    )


FAMILIES = [  # make, frames, latent shape of 32 x 64 pixels, image model
    (kl, 3, (4, 3, 16, 32), True),
    (dc, 2, (4, 2, 16, 32), True),
    (tiny, 2, (4, 2, 16, 32), True),
    (wan, 5, (4, 2, 4, 8), False),
    (cogvideox, 5, (4, 3, 16, 32), False),
    (ltx, 5, (8, 3, 4, 8), False),
]


@pytest.fixture
def saved(request, tmp_path):
    torch.manual_seed(0)
    request.param().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("saved", "frames", "shape", "image"), FAMILIES, indirect=["saved"], ids=[f[0].__name__ for f in FAMILIES]
)
def test_diffusers_autoencoders(saved, frames, shape, image):
    vae = load_autoencoder(str(saved))
    coder = as_codec(vae)
    assert isinstance(coder, Autoencoder) and coder.video is not image
    assert coder.latent_shape(frames, 32, 64) == shape
    clip = clips(2, frames, 32, 64)
    latents = coder.encode(clip)
    assert latents.shape == (2, *shape) and latents.dtype == torch.float32
    assert torch.equal(latents, coder.encode(clip))
    assert coder.decode(latents).shape == clip.shape
    assert not vae.training and not any(parameter.requires_grad for parameter in vae.parameters())
    if image:
        assert torch.allclose(coder.encode(clip[:, :, 1:2]), latents[:, :, 1:2], atol=1e-5)


def test_normalisation_by_scaling_and_shift_factor():
    vae, clip = kl(), clips(1, 2, 16, 16)
    coder = Autoencoder(vae)
    raw = torch.stack([vae.encode(clip[:, :, t]).latent_dist.mode() for t in range(2)], 2)
    assert torch.allclose(coder.encode(clip), (raw - 0.25) * 0.5, atol=1e-5)
    assert torch.allclose(coder._denormalise(coder._normalise(raw)), raw, atol=1e-6)


def test_normalisation_by_mean_and_deviation():
    vae, clip = wan(), clips(1, 5, 16, 16)
    raw = vae.encode(clip).latent_dist.mode()
    mean, std = (torch.tensor(x).view(1, 4, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    assert torch.allclose(Autoencoder(vae).encode(clip), (raw - mean) / std, atol=1e-5)


def test_normalisation_by_statistics_kept_as_buffers():
    """As the LTX pipelines do: (latents - mean) * scaling / std."""
    vae, clip = ltx(), clips(1, 5, 32, 32)
    coder = Autoencoder(vae)
    raw = vae.encode(clip).latent_dist.mode()
    mean, std = (x.view(1, 8, 1, 1, 1) for x in (vae.latents_mean, vae.latents_std))
    assert torch.allclose(coder.encode(clip), (raw - mean) * 0.5 / std, atol=1e-5)
    assert torch.allclose(coder._denormalise(coder._normalise(raw)), raw, atol=1e-5)


def test_a_decoder_that_wants_a_time_is_told_zero():
    coder = Autoencoder(ltx(timestep_conditioning=True))
    assert coder.latent_shape(5, 32, 32) == (8, 3, 4, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (wan, "AutoencoderKLWan cannot take num_frames 8: it gives 5 frames back; the nearest number it takes is 9"),
        (ltx, "the nearest number it takes is 7"),
    ],
)
def test_a_number_of_frames_is_refused_with_one_that_fits(make, message):
    with pytest.raises(CodecError) as refusal:
        Autoencoder(make()).latent_shape(8, 32, 32)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_pixels_outside_a_cell_are_refused():
    with pytest.raises(CodecError, match=r"height 20 is not divisible by the autoencoder's cell of 8$"):
        Autoencoder(wan()).latent_shape(5, 20, 32)


def test_a_subfolder_and_a_number_format(tmp_path):
    kl().save_pretrained(tmp_path / "vae")
    vae = load_autoencoder(str(tmp_path), "vae", "bfloat16")
    assert vae.dtype == torch.bfloat16
    coder = Autoencoder(vae)
    latents = coder.encode(clips(1, 1, 16, 16))
    assert latents.dtype == torch.float32 and coder.decode(latents).dtype == torch.float32


def refused(path, *args) -> str:
    with pytest.raises(CodecError) as refusal:
        load_autoencoder(str(path), *args)
    message = str(refusal.value)
    assert message.startswith("codec.path: ") and "\n" not in message
    return message


def test_folders_that_hold_no_autoencoder(tmp_path):
    assert "no autoencoder at" in refused(tmp_path / "missing")
    assert "nowhere is neither a folder nor a hub id" in refused("nowhere")
    assert "no autoencoder at" in refused("someone/something")
    assert "no autoencoder at" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "no autoencoder at" in refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    assert refused(tmp_path).endswith("holds UNet2DModel, not a diffusers autoencoder")
    (tmp_path / "config.json").write_text("{}")
    assert refused(tmp_path).endswith("holds no class name, not a diffusers autoencoder")


def test_pickled_damaged_and_partial_weights(tmp_path):
    from safetensors.torch import load_file, save_file

    vae = kl()
    vae.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert "cannot be loaded" in refused(tmp_path / "pickled")
    vae.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if name != "encoder.conv_in.bias"}, weights)
    assert refused(tmp_path).endswith("lacks 1 weights of AutoencoderKL, encoder.conv_in.bias among them")
    save_file({**tensors, "encoder.conv_in.bias": torch.zeros(3)}, weights)
    assert "cannot be loaded" in refused(tmp_path)
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in refused(tmp_path)
