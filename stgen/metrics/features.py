"""Features of clips, from whatever is at hand: a fixed random network, a codec, or a network from local files.

What a distance between features is worth depends on the network, so each carries its name and a hash of its weights.
The name FVD (arXiv:1812.01717) belongs to the I3D network with its Kinetics weights alone; nothing is ever downloaded.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

CPU = torch.device("cpu")
SEED = 0  # of random weights
CHANNELS = 32  # of the random network; it has three times as many features
BATCH = 16
KINETICS = ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))  # mean and deviation that torchvision expects
SIDES = {"r3d_18": 112, "mc3_18": 112, "r2plus1d_18": 112, "s3d": 224, "mvit_v1_b": 224, "mvit_v2_s": 224,
         "swin3d_t": 224, "swin3d_s": 224, "swin3d_b": 224}  # fmt: skip
I3D_FEATURES = 400  # what the published TorchScript file gives: the outputs before the softmax over 400 classes


class FeatureError(ValueError):
    """Features that cannot be had; one sentence that says what to do."""


@dataclass(frozen=True)
class Features:
    """A way from clips to vectors.

    name: what it is, in words. weights: where its weights come from. sha256: of those. fvd: whether it is I3D.
    """

    name: str
    weights: str
    sha256: str
    fvd: bool
    device: torch.device
    _of: Callable[[Tensor], Tensor]  # uint8 [B, 3, T, H, W] -> [B, d]

    @torch.no_grad()
    def __call__(self, clips: Sequence[Tensor]) -> Tensor:
        """Clips uint8 [T, 3, H, W] of one size -> float64 [n, d] on the CPU. Raises FeatureError for a size it cannot take."""
        batches = [torch.stack(list(clips[i : i + BATCH])).transpose(1, 2) for i in range(0, len(clips), BATCH)]
        try:
            return torch.cat([self._of(batch.to(self.device)).double().cpu() for batch in batches])
        except RuntimeError as error:
            t, _, h, w = clips[0].shape
            reason = str(error).strip().splitlines()[-1][:160]  # a script's error begins with its own traceback
            raise FeatureError(f"features: {self.name} does not take {t} frames of {h}x{w}: {reason}") from None

    def about(self) -> dict[str, Any]:
        return {"name": self.name, "weights": self.weights, "sha256": self.sha256, "fvd": self.fvd}


def open_features(which: str, encode: Callable[[Tensor], Tensor] | None = None, device: torch.device = CPU) -> Features:
    """The features that `which` names, computed on `device`.

    random: a fixed network of random weights. codec: `encode`, clips [B, 3, T, H, W] in [-1, 1] -> latents.
    FILE.pt: a TorchScript network that takes clips [B, 3, T, H, W] in [-1, 1]. i3d:FILE.pt: the published TorchScript
    of I3D. NAME or NAME:FILE: a video network of torchvision, with random weights or those of a file (.pth, .safetensors).
    Raises FeatureError.
    """
    name, _, path = which.partition(":")
    if which == "random":
        return _random(device)
    if which == "codec":
        return _codec(encode, device)
    if name == "i3d":
        return _i3d(Path(path), device)
    if name in SIDES:
        return _torchvision(name, Path(path) if path else None, device)
    if which.endswith((".pt", ".ts", ".jit")):
        return _torchscript(Path(which), device)
    raise FeatureError(
        f"features: {which!r} is none of random, codec, a TorchScript file (.pt), i3d:FILE.pt, and NAME or NAME:FILE for a "
        f"torchvision network ({', '.join(SIDES)})"
    )


# ------------------------------------------------------------------------------------------------------ with no weights


def random_network(seed: int = SEED) -> nn.Sequential:
    """Three strided 3-D convolutions with ReLU between; weights of variance 2 / inputs (arXiv:1502.01852), from `seed`."""
    sizes = ((3, CHANNELS // 2), (CHANNELS // 2, CHANNELS), (CHANNELS, CHANNELS))
    g = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(sizes):
        layer = nn.Conv3d(inputs, outputs, 3, stride=(1, 2, 2) if i == 0 else 2, padding=1, bias=False)
        layer.weight.data = torch.randn(layer.weight.shape, generator=g) * (2 / (27 * inputs)) ** 0.5
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def _random(device: torch.device) -> Features:
    network = random_network()
    digest = hashlib.sha256(b"".join(w.detach().numpy().tobytes() for w in network.parameters())).hexdigest()
    network.to(device)
    words = f"a fixed random 3-D convolutional network ({3 * CHANNELS} features)"
    return Features(words, f"random, seed {SEED}", digest, False, device, lambda x: _pooled(network(_to_unit(x))))


def _codec(encode: Callable[[Tensor], Tensor] | None, device: torch.device) -> Features:
    if encode is None:
        raise FeatureError("features: codec needs the codec of a run; say random or name a network")
    return Features("the codec's latents", "the run's codec", "", False, device, lambda x: _pooled(encode(_to_unit(x))))


def _pooled(x: Tensor) -> Tensor:
    """Of each channel its mean, its deviation over space, and that over time: [B, C, t, h, w] -> [B, 3 C]."""
    x = x.flatten(3)  # [B, C, t, h w]
    over_space, over_time = x.std(3, correction=0).mean(2), x.std(2, correction=0).mean(2)
    return torch.cat([x.mean((2, 3)), over_space, over_time], dim=1)


# ------------------------------------------------------------------------------------------------------ from local files


def _torchscript(path: Path, device: torch.device) -> Features:
    network = _load_script(path, device)
    return Features(
        f"{path.name} (TorchScript)", path.name, _hash(path), False, device, lambda x: network(_to_unit(x)).flatten(1)
    )


def _i3d(path: Path, device: torch.device) -> Features:
    """The published TorchScript of I3D scales and resizes by itself and is asked for its features.

    Its weights cannot be proved to be Kinetics', so the number carries the file's hash.
    """
    network = _load_script(path, device)

    def of(clips: Tensor) -> Tensor:
        return network(clips.float(), rescale=True, resize=True, return_features=True)

    try:
        width = of(torch.zeros(1, 3, 16, 64, 64, dtype=torch.uint8, device=device)).shape[1]
    except Exception as error:  # whatever a script may raise
        raise FeatureError(f"features: {path} is not the TorchScript of I3D: {_first_line(error)}") from None
    if width != I3D_FEATURES:
        raise FeatureError(f"features: {path} gives {width} features where I3D gives {I3D_FEATURES}; leave out i3d:")
    return Features("I3D", path.name, _hash(path), True, device, of)


def _torchvision(name: str, path: Path | None, device: torch.device) -> Features:
    from torchvision.models import get_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = get_model(name, weights=None).eval()
    if path is not None:
        _load_weights(network, path)
    for head in ("fc", "classifier", "head"):
        if hasattr(network, head):
            setattr(network, head, nn.Identity())
    network.to(device)
    side, (mean, deviation) = SIDES[name], (torch.tensor(x, device=device).view(3, 1, 1, 1) for x in KINETICS)

    def of(clips: Tensor) -> Tensor:
        size = (16 if "mvit" in name else clips.shape[2], side, side)  # its positions are made for 16 frames
        scaled = interpolate(clips.float() / 255, size, mode="trilinear", align_corners=False)
        return network((scaled - mean) / deviation).flatten(1)

    weights = f"random, seed {SEED}" if path is None else path.name
    return Features(f"{name} of torchvision", weights, "" if path is None else _hash(path), False, device, of)


def _load_script(path: Path, device: torch.device) -> Any:
    if not path.is_file():
        raise FeatureError(f"features: there is no file {path}")
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise FeatureError(f"features: {path} cannot be loaded as TorchScript: {_first_line(error)}") from None


def _load_weights(network: nn.Module, path: Path) -> None:
    from safetensors.torch import load_file

    try:
        safe = path.suffix == ".safetensors"
        network.load_state_dict(load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # of two formats, in many words
        raise FeatureError(f"features: {path} holds no weights of this network: {_first_line(error)}") from None


def _to_unit(clips: Tensor) -> Tensor:
    return clips.float() / 127.5 - 1


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
