"""Pipelines, checkpoints and folders of videos from anywhere: each trap is refused in one line that names it, nothing it
points to is imported, opened or connected to, and what is whole still loads."""

import json
import os
import random
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fault_runs
import pytest
import torch
from fault_guard import guarded
from fault_runs import write_videos
from safetensors.torch import load_file, save_file

from stgen import build, checkpoint, codec, schema, text
from stgen.build import BuildError, load_pipeline
from stgen.checkpoint import CheckpointError
from stgen.codec import PatchPCA
from stgen.dataset import VideoFolder
from stgen.model import VideoTransformer
from stgen.objective import Objective
from stgen.pipeline import VideoPipeline, build_scheduler
from stgen.saved import SavedError
from stgen.text import LearnedTextEncoder
from stgen.train import train

SIZE = {"num_frames": 4, "height": 16, "width": 16}


# ------------------------------------------------------------------------------------------------------- pipelines


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    component = PatchPCA((2, 8, 8), 6).fit(torch.rand(4, 3, 4, 16, 16) * 2 - 1)
    transformer = VideoTransformer(6, (2, 2, 2), width=16, depth=1, heads=2, text_width=8, plan="spatial")
    encoder = LearnedTextEncoder(["a", "circle", "red"], width=8, max_length=6)
    sampling = {**SIZE, "fps": 8.0, "num_inference_steps": 1, "guidance_scale": 1.0, "max_length": 6}
    scheduler = build_scheduler(None, Objective())
    pipeline = VideoPipeline(transformer, component, encoder, scheduler, objective={}, sampling=sampling)
    folder = tmp_path_factory.mktemp("saved") / "final"
    pipeline.save_pretrained(folder)
    return folder


def edit(file: str, change: Callable[[dict], Any]) -> Callable[[Path], None]:
    """A trap that changes the JSON object of a file."""

    def trap(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        content = change(content) or content
        (folder / file).write_text(json.dumps(content))

    return trap


def names(slot: str, library: Any, name: Any) -> Callable[[Path], None]:
    return edit("model_index.json", lambda index: index.update({slot: [library, name]}))


def adds(file: str, content: bytes = b"raise SystemExit('executed')\n") -> Callable[[Path], None]:
    def trap(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(content)

    return trap


def links(file: str, target: str) -> Callable[[Path], None]:
    """Puts a link in place of a file; `outside` is a copy of it beside the folder."""

    def trap(folder: Path) -> None:
        outside = folder.parent / f"secret-{Path(file).name}"
        shutil.copy(folder / file, outside)
        (folder / file).unlink()
        (folder / file).symlink_to(outside if target == "outside" else target)

    return trap


def weights(file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def trap(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return trap


def header(file: str, make: Callable[[bytes, bytes], bytes]) -> Callable[[Path], None]:
    """Replaces a safetensors file by what `make` gives for its header and data."""

    def trap(folder: Path) -> None:
        whole = (folder / file).read_bytes()
        (length,) = struct.unpack("<Q", whole[:8])
        (folder / file).write_bytes(make(whole[8 : 8 + length], whole[8 + length :]))

    return trap


def framed(content: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def lying(**changes: Any) -> Callable[[bytes, bytes], bytes]:
    """A header whose first tensor's entry says something else."""

    def make(content: bytes, data: bytes) -> bytes:
        entries = json.loads(content)
        name = next(key for key in entries if key != "__metadata__")
        entries[name].update(changes)
        return framed(json.dumps(entries).encode(), data)

    return make


HEADERS = {  # what is wrong with the header of a safetensors file
    "longer than the file": lambda content, data: framed(content, data, 2**62),
    "shorter than itself": lambda content, data: framed(content, data, 5),
    "no JSON": lambda content, data: framed(b"\x80\x04cos\nsystem\n", data),
    "a list": lambda content, data: framed(b"[]", data),
    "a bomb": lambda content, data: framed(b'{"a":' * 20_000, data),
    "data cut off": lambda content, data: framed(content, data[: len(data) // 2]),
    "data left over": lambda content, data: framed(content, data + b"\0" * 64),
    "offsets beyond the end": lying(data_offsets=[0, 2**40]),
    "offsets that go back": lying(data_offsets=[64, 0]),
    "offsets below zero": lying(data_offsets=[-8, 8]),
    "a shape that overflows": lying(shape=[2**40, 2**40]),
    "a type that is none": lying(dtype="pickle"),
    "a pickle": lambda content, data: b"\x80\x04cposix\nsystem\n(S'touch secret'\ntR.",
    "nothing": lambda content, data: b"",
}
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
BOMB = b'{"a":' * 200_000 + b"1" + b"}" * 200_000

TRAPS: dict[str, tuple[Callable[[Path], None], str]] = {  # trap: (what it does to the folder, what must be named)
    "this": (names("transformer", "this", "d"), "transformer names ['this', 'd']"),
    "os": (names("scheduler", "os", "system"), "scheduler names ['os', 'system']"),
    "subprocess": (names("codec", "subprocess", "Popen"), "codec names"),
    "a submodule": (names("codec", "antigravity", "fly"), "codec names"),
    "an attribute of ours": (names("transformer", "stgen.model", "torch"), "transformer names"),
    "a class of ours elsewhere": (names("codec", "stgen.model", "VideoTransformer"), "codec names"),
    "another library's class": (names("text_encoder", "torch", "load"), "text_encoder names"),
    "an automatic class": (names("text_encoder", "transformers", "AutoModel"), "text_encoder names"),
    "a pipeline": (names("text_encoder", "transformers", "pipeline"), "text_encoder names"),
    "an onnx model": (names("codec", "diffusers", "OnnxRuntimeModel"), "codec names"),
    "a class with a path": (names("scheduler", "diffusers", "../../x.Scheduler"), "scheduler names"),
    "a library with a path": (names("scheduler", "../../../tmp/evil", "EvilScheduler"), "scheduler names"),
    "one word": (edit("model_index.json", lambda i: i.update(codec="os")), "codec names 'os'"),
    "three words": (edit("model_index.json", lambda i: i.update(codec=["a", "b", "c"])), "codec names"),
    "numbers": (edit("model_index.json", lambda i: i.update(codec=[1, 2])), "codec names [1, 2]"),
    "a slot of one's own": (edit("model_index.json", lambda i: i.update(evil=["os", "system"])), "unknown key 'evil'"),
    "another pipeline": (edit("model_index.json", lambda i: i.update(_class_name="WanPipeline")), "_class_name"),
    "a custom pipeline": (edit("model_index.json", lambda i: i.update(_class_name=["pipe", "Evil"])), "_class_name"),
    "a missing slot": (edit("model_index.json", lambda i: {k: v for k, v in i.items() if k != "codec"}), "codec is missing"),
    "an index that is a list": (edit("model_index.json", lambda i: [i]), "holds no JSON object"),
    "an index that is a bomb": (adds("model_index.json", BOMB), "model_index.json: not JSON that can be read"),
    "an index that is empty": (adds("model_index.json", b""), "model_index.json: not JSON"),
    "an objective of its own": (edit("model_index.json", lambda i: i.update(objective={"evil": 1})), "objective.evil"),
    "an objective that is a list": (edit("model_index.json", lambda i: i.update(objective=[1])), "objective: "),
    "a huge clip": (edit("model_index.json", lambda i: i["sampling"].update(num_frames=10**9)), "sampling.num_frames"),
    "a clip of words": (edit("model_index.json", lambda i: i["sampling"].update(num_frames="8")), "sampling.num_frames"),
    "a rate of nothing": (edit("model_index.json", lambda i: i["sampling"].update(fps=0)), "sampling.fps"),
    "half a size": (edit("model_index.json", lambda i: i["sampling"].__delitem__("num_frames")), "sampling.num_frames"),
    "code beside weights": (adds("transformer/stgen.model.py"), "stgen.model.py: a saved pipeline holds"),
    "code above": (adds("pipeline.py"), "pipeline.py: a saved pipeline holds"),
    "pickled weights": (adds("transformer/diffusion_pytorch_model.bin"), "diffusion_pytorch_model.bin: a saved pipeline"),
    "an adapter": (adds("text_encoder/adapter_config.json", b'{"base_model_name_or_path": "evil/x"}'), "adapter_config.json"),
    "auto_map": (edit("transformer/config.json", lambda c: c.update(auto_map={"AutoModel": "evil.Evil"})), "auto_map"),
    "a kernel of the hub": (edit("text_encoder/config.json", lambda c: c.update(attn_implementation="evil/k")), "attn_imp"),
    "quantisation": (edit("transformer/config.json", lambda c: c.update(quantization_config={"a": 1})), "quantization_config"),
    "a huge width": (edit("transformer/config.json", lambda c: c.update(width=10**9)), "config.json: width: 1e+09"),
    "a depth without end": (edit("transformer/config.json", lambda c: c.update(depth=10**6)), "config.json: depth: 1e+06"),
    "a config that is a bomb": (adds("transformer/config.json", BOMB), "config.json: not JSON that can be read"),
    "a scheduler that is a bomb": (adds("scheduler/scheduler_config.json", BOMB), "scheduler_config.json: not JSON"),
    "a scheduler of huge tables": (
        edit("scheduler/scheduler_config.json", lambda c: c.update(num_train_timesteps=10**11)),
        "num_train_timesteps",
    ),
    "shards elsewhere": (
        adds("transformer/m.safetensors.index.json", b'{"weight_map": {"a": "../../secret.safetensors"}}'),
        "weight_map names '../../secret.safetensors'",
    ),
    "shards at the root": (
        adds("transformer/m.safetensors.index.json", b'{"weight_map": {"a": "/etc/secret.safetensors"}}'),
        "weight_map names '/etc/secret.safetensors'",
    ),
    "shards that are no mapping": (adds("transformer/m.safetensors.index.json", b'{"weight_map": 3}'), "weight_map is no"),
    "weights that are a link": (links(TRANSFORMER, "outside"), "is a link that leads out of"),
    "a config that is a link": (links("transformer/config.json", "outside"), "is a link that leads out of"),
    "a device": (links("codec/config.json", "/dev/zero"), "leads out of"),
    "a link to itself": (links("codec/config.json", "config.json"), "config.json"),
    "a pipe": (
        lambda f: ((f / "codec/config.json").unlink(), os.mkfifo(f / "codec/config.json"))[1],
        "is not a regular file",
    ),
    "a missing weight": (weights(TRANSFORMER, lambda t: t.pop("final_proj.weight")), "final_proj.weight is missing"),
    "an extra weight": (weights(TRANSFORMER, lambda t: t.update(evil=torch.zeros(1))), "evil is unexpected"),
    "a misshapen weight": (
        weights(TRANSFORMER, lambda t: t.update({"final_proj.weight": torch.zeros(1)})),
        "final_proj.weight",
    ),
    **{f"a header with {name}": (header(TRANSFORMER, make), "transformer") for name, make in HEADERS.items()},
}  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
def test_a_hostile_pipeline_is_refused_by_name(saved, tmp_path, trap, figure):
    folder = shutil.copytree(saved, tmp_path / "final", symlinks=True)
    change, named = TRAPS[trap]
    change(folder)
    before = set(sys.modules)
    with pytest.raises((SavedError, BuildError)) as refusal, guarded():
        load_pipeline(folder)
    said = str(refusal.value)
    assert named in said and str(folder) in said and len(said.splitlines()) == 1 and len(said) < 1000, said
    loaded = {
        name for name in set(sys.modules) - before if not name.startswith(("diffusers.", "transformers.", "stgen."))
    }
    assert not loaded & {"this", "antigravity", "evil", "pipe"}, loaded
    assert not (tmp_path / "secret").exists()
    figure("hostile pipelines refused by name; nothing imported, opened or connected to")


def test_the_pipeline_that_is_set_traps_loads(saved, tmp_path):
    """Else the refusals would prove nothing; a readme, a licence and hidden files are no traps."""
    folder = shutil.copytree(saved, tmp_path / "final")
    for name in ("README.md", "LICENSE", ".gitattributes"):
        (folder / name).write_text("words")
    clips = [load_pipeline(f)("a red circle", output_type="pt", generator=torch.Generator().manual_seed(0)).frames
             for f in (saved, folder)]  # fmt: skip
    assert torch.equal(*clips) and clips[0].shape == (1, 4, 3, 16, 16)
    assert VideoPipeline.from_pretrained(folder).config.sampling["height"] == 16


@pytest.mark.parametrize("name", ["nobody/nothing", "http://127.0.0.1:9/final", "/no/such/folder", "final\0"])
def test_a_pipeline_is_a_folder_and_nothing_is_fetched(tmp_path, name):
    with pytest.raises((SavedError, ValueError)) as refusal, guarded():
        VideoPipeline.from_pretrained(name)
    assert len(str(refusal.value).splitlines()) == 1


# ------------------------------------------------------------------------------------------------------ checkpoints

RUN = ("train.train_batch_size=2", "train.max_train_steps=2", "optim.lr_warmup_steps=1")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return write_videos(tmp_path_factory.mktemp("videos"), 3)


def make(home: Path, videos: Path, *overrides: str) -> schema.Config:
    return fault_runs.make(home, videos, *RUN, *overrides)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, videos) -> Path:
    home = tmp_path_factory.mktemp("trained")
    train(make(home, videos))
    return home / "run" / "checkpoint-2"


def sealed(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    """A trap whose author has made the manifest agree with it."""

    def trap(folder: Path) -> None:
        change(folder)
        entries = {}
        for path in sorted(folder.iterdir()):
            if path.name != checkpoint.MANIFEST and path.is_file() and not path.is_fifo():
                entries[path.name] = {"size": path.stat().st_size, "sha256": checkpoint._sha256(path)}
        manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
        del manifest["sha256"]
        (folder / checkpoint.MANIFEST).write_text(checkpoint._render({**manifest, "files": entries}))

    return trap


def manifest(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def trap(folder: Path) -> None:
        content = json.loads((folder / checkpoint.MANIFEST).read_text())
        del content["sha256"]
        content = change(content) or content
        (folder / checkpoint.MANIFEST).write_text(checkpoint._render(content))

    return trap


def entry(name: Any, size: Any = 0, sha256: Any = "") -> Callable[[Path], None]:
    return manifest(lambda m: m["files"].update({name: {"size": size, "sha256": sha256}}))


def state(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    return sealed(edit("state.json", change))


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    return sealed(weights(file, change))


def piped(file: str) -> Callable[[Path], None]:
    def trap(folder: Path) -> None:
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return trap


SEALED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a file above": (entry("../secret.safetensors"), "names '../secret.safetensors'"),
    "a file at the root": (entry("/etc/secret"), "names '/etc/secret'"),
    "the folder above": (entry(".."), "names '..'"),
    "a name that is empty": (entry(""), "names ''"),
    "a pickle": (entry("model.pt"), "names 'model.pt'"),
    "a size in words": (entry("x.safetensors", "1"), "x.safetensors: size and sha256 are wanted"),
    "a hash that is a list": (entry("x.safetensors", 1, []), "x.safetensors: size and sha256 are wanted"),
    "files that are a list": (manifest(lambda m: m.update(files=[])), "names no state.json"),
    "no files": (manifest(lambda m: m.update(files={})), "names no state.json"),
    "a step in words": (manifest(lambda m: m.update(step="2")), "step '2' is no number of steps"),
    "a step below zero": (manifest(lambda m: m.update(step=-1)), "is no number of steps"),
    "a step beyond counting": (manifest(lambda m: m.update(step=10**40)), "is no number of steps"),
    "no step": (manifest(lambda m: m.pop("step") and None), "is no number of steps"),
    "another format": (manifest(lambda m: m.update(format=[2] * 999)), "this version reads 1"),
    "a manifest that is a bomb": (adds("manifest.json", BOMB), "not the manifest that was saved"),
    "a manifest that is a list": (adds("manifest.json", b"[]"), "not the manifest that was saved"),
    "a manifest that is a pipe": (piped("manifest.json"), "is neither a run folder, nor a checkpoint"),
    "weights that are a pipe": (piped("model.safetensors"), "not a regular file"),
    "weights that are a link": (sealed(links("model.safetensors", "outside")), "not a regular file"),
    "a state that is a link": (sealed(links("state.json", "outside")), "not a regular file"),
    "a state that is a bomb": (sealed(adds("state.json", BOMB)), "state.json"),
    "a state that is a list": (state(lambda s: [s]), "state.json: holds no JSON object"),
    "a state without a config": (state(lambda s: s.pop("config") and None), "state.json: config: "),
    "a config of another version": (state(lambda s: s["config"].update(evil=1)), "state.json: config.evil: "),
    "a config of huge width": (state(lambda s: s["config"]["model"].update(width=10**12)), "model.width"),
    "a config of a model without end": (
        state(lambda s: s["config"]["model"].update(width=65536, depth=1024)),
        "model.safetensors: holds ",
    ),
    "a config of words without end": (
        state(lambda s: (s["config"]["text"].update(width=65536), s.update(vocabulary=["a"] * 10_000))[-1]),
        "model.safetensors: holds ",
    ),
    "a config of patches without end": (
        state(lambda s: (s["config"]["codec"].update(patch_size=[4, 10000, 10000], components=10**6),
                         s["config"]["data"].update(height=10000, width=10000))[-1]),
        "codec.safetensors: holds ",
    ),
    "a vocabulary of numbers": (state(lambda s: s.update(vocabulary=[1])), "state.json: vocabulary.0: "),
    "a rate that is none": (state(lambda s: s.update(fps=float("nan"))), "state.json: fps: "),
    "a rate in words": (state(lambda s: s.update(fps="8")), "state.json: fps: "),
    "a state with more": (state(lambda s: s.update(evil="x")), "state.json: evil: "),
    "progress that is none": (state(lambda s: s.update(progress=3)), "state.json: progress: "),
    "a missing group": (sealed(lambda f: (f / "ema.safetensors").unlink()), "ema.safetensors: missing"),
    "a missing weight": (
        tensors("model.safetensors", lambda t: t.pop("transformer.final_proj.weight")),
        "model: this checkpoint holds another architecture: transformer.final_proj.weight is missing",
    ),
    "an extra weight": (tensors("model.safetensors", lambda t: t.update(evil=torch.zeros(1))), "evil is unexpected"),
    "a misshapen weight": (
        tensors("model.safetensors", lambda t: t.update({"transformer.final_proj.weight": torch.zeros(2, 2)})),
        "transformer.final_proj.weight has shape [2, 2]",
    ),
    "a weight of whole numbers": (
        tensors("model.safetensors", lambda t: t.update({"transformer.final_proj.bias": torch.zeros(6, dtype=torch.int64)})),
        "transformer.final_proj.bias has type int64, not float32",
    ),
    "a codec of another size": (tensors("codec.safetensors", lambda t: t.update(mean=torch.zeros(3))), "codec: "),
    **{
        f"a header with {name}": (sealed(header("model.safetensors", made)), "model.safetensors")
        for name, made in HEADERS.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("trap", SEALED)
def test_a_hostile_checkpoint_is_refused_by_name(trained, tmp_path, trap, figure):
    folder = shutil.copytree(trained, tmp_path / "checkpoint-2")
    change, named = SEALED[trap]
    change(folder)
    with pytest.raises((CheckpointError, BuildError)) as refusal, guarded():
        load_pipeline(folder, "raw")
    said = str(refusal.value)
    assert named in said and len(said.splitlines()) == 1 and len(said) < 2000, said
    figure("hostile checkpoints, their hashes in order, refused by name")


def test_the_checkpoint_that_is_set_traps_loads(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "checkpoint-2")
    sealed(lambda folder: None)(folder)
    assert load_pipeline(folder)("a red circle", output_type="pt").frames.shape == (1, 4, 3, 16, 16)


RESUMED = {  # what a resume reads beside what sampling reads
    "a generator that is none": (tensors("random.safetensors", lambda t: t.update(numpy=t["numpy"][:5])), "random states"),
    "a generator of fractions": (tensors("random.safetensors", lambda t: t.update(torch=torch.zeros(4))), "random states"),
    "moments that are missing": (
        tensors("optimizer.safetensors", lambda t: t.pop("transformer.final_proj.weight.exp_avg")),
        "optimizer: this checkpoint holds another architecture: transformer.final_proj.weight.exp_avg is missing",
    ),
    "averages of another shape": (
        tensors("ema.safetensors", lambda t: t.update({"transformer.final_proj.bias": torch.zeros(7)})),
        "ema: this checkpoint holds another architecture: transformer.final_proj.bias has shape [7], not [6]",
    ),
    "no progress": (state(lambda s: s.pop("progress") and None), "state.json: progress: "),
    "an id in numbers": (state(lambda s: s["progress"].update(wandb_id=3)), "state.json: progress.wandb_id: "),
}  # fmt: skip


@pytest.mark.parametrize("trap", RESUMED)
def test_a_hostile_checkpoint_is_not_resumed(trained, videos, tmp_path, trap, figure):
    folder = shutil.copytree(trained, tmp_path / "from")
    change, named = RESUMED[trap]
    change(folder)
    with pytest.raises(CheckpointError) as refusal:
        train(make(tmp_path, videos, f"run.resume_from_checkpoint={folder}", "train.max_train_steps=3",
                   "run.allow_changed_config=true"))  # fmt: skip
    assert named in str(refusal.value) and len(str(refusal.value).splitlines()) == 1
    figure("hostile checkpoints, their hashes in order, refused by name")


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("codec", {"kind": "diffusers", "path": "evil/autoencoder", "subfolder": None, "dtype": "float32"}),
        ("codec", {"kind": "diffusers", "path": "http://127.0.0.1:9/x", "subfolder": None, "dtype": "float32"}),
        ("text", {"kind": "transformers", "path": "evil/encoder", "subfolder": None, "max_length": 8,
                  "conditioning": "adaln", "caption_dropout": 0.1}),
    ],
)  # fmt: skip
def test_a_hub_id_in_a_checkpoint_is_not_fetched(trained, tmp_path, monkeypatch, section, change):
    """The config in a checkpoint is not the user's own; without HF_HUB_OFFLINE it would be looked up on the network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    folder = shutil.copytree(trained, tmp_path / "checkpoint-2")
    state(lambda s: s["config"].update({section: change}))(folder)
    with pytest.raises((codec.CodecError, text.TextError)) as refusal, guarded():
        load_pipeline(folder)
    assert change["path"] in str(refusal.value)


@pytest.mark.parametrize("count", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_flipped_and_resealed_bytes_never_end_in_a_traceback(trained, tmp_path, count, figure):
    """Damage whose hash agrees: it loads, or it is refused by name; never anything else."""
    chance, refused = random.Random(3), 0
    for i in range(count):
        folder = shutil.copytree(trained, tmp_path / str(i))
        victim = folder / chance.choice(["state.json", "model.safetensors", "codec.safetensors", "ema.safetensors"])
        data = bytearray(victim.read_bytes())
        for _ in range(chance.choice([1, 1, 4, 64])):
            data[chance.randrange(min(len(data), 2000))] = chance.randrange(256)
        victim.write_bytes(bytes(data[: chance.choice([len(data), chance.randrange(len(data))])]))
        sealed(lambda folder: None)(folder)
        try:
            load_pipeline(folder)
        except (CheckpointError, BuildError, ValueError) as error:
            assert type(error).__module__.startswith("stgen."), repr(error)
            refused += 1
        shutil.rmtree(folder)
    assert refused > count // 2
    figure("checkpoints damaged and sealed again: refused by name", refused)
    figure("checkpoints damaged and sealed again: they load", count - refused)


# ------------------------------------------------------------------------------------------------ folders of videos


ROWS = [  # file_name of a row of metadata that must be refused; {out} is the folder beside that of the videos
    "../secret.mp4", "../../secret.mp4", "a/../../secret.mp4", "./../secret.mp4", "{out}/secret.mp4", "/etc/passwd",
    "/dev/zero", "/proc/self/mem", "C:\\secret.mp4", "c:/secret.mp4", "\\\\server\\secret.mp4", "~/secret.mp4",
    "http://127.0.0.1:9/secret.mp4", "https://127.0.0.1:9/x.mp4", "rtsp://127.0.0.1/x.mp4", "file:///etc/passwd",
    "ftp://127.0.0.1/x.mp4", "concat:0.mp4|1.mp4", "pipe:0", "fd:3", "data:video/mp4;base64,AAAA", "s3://b/secret.mp4",
    "subfile,,start,0,end,9,,:0.mp4", "crypto:0.mp4", "tcp://127.0.0.1:9", "hf://datasets/x/secret.mp4",
    "0.mp4\0.txt", "0.mp4/../../secret.mp4", "$HOME/secret.mp4", "`id`.mp4", "", ".", "..", "link/secret.mp4",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_hostile_rows_are_refused_by_line_and_open_nothing(videos, tmp_path, kind, figure):
    folder = shutil.copytree(videos, tmp_path / "set")
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    rows = [name.format(out=tmp_path) for name in ROWS]
    if kind == "csv":
        lines = ["file_name,text", *('"' + name.replace('"', '""').replace("\0", "") + '",x' for name in rows)]
    else:
        lines = [json.dumps({"file_name": name, "text": "x"}) for name in rows]
    (folder / f"metadata.{kind}").write_text("\n".join(lines) + "\n")
    with guarded():
        found = VideoFolder(folder, **SIZE, max_reject_fraction=1.0, progress=False)
    told = {reject.path: reject.reason for reject in found.rejects}
    first = 2 if kind == "csv" else 1
    missing = [name for i, name in enumerate(rows, first) if f"metadata.{kind}:{i}" not in told]
    assert not missing
    assert len(found) == 3 and not any("secret" in sample.caption for sample in found.samples)
    figure("hostile rows of metadata refused by file and line, nothing opened or connected to", len(rows))


LINKED = {  # what leads out of the folder -> what it holds
    "0.txt": b"secret of a caption",
    "metadata.jsonl": b'{"file_name": "1.mp4", "text": "secret of metadata"}\n',
}


@pytest.mark.parametrize("name", LINKED)
def test_words_are_not_read_through_a_link_that_leads_out(videos, tmp_path, name):
    """A caption is learned, logged and passed on: a link in a downloaded folder must not make one of a private file."""
    folder = shutil.copytree(videos, tmp_path / "set")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "secret").write_bytes(LINKED[name])
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "private" / "secret")
    with guarded():
        found = VideoFolder(folder, **SIZE, max_reject_fraction=1.0, progress=False)
    assert not any("secret" in sample.caption for sample in found.samples)
    assert any(reject.path == name and "link" in reject.reason for reject in found.rejects)


def test_linked_folders_and_linked_pairs_keep_their_words(videos, tmp_path):
    """What a user links on purpose: whole folders, and videos with the captions that lie beside them."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "all").symlink_to(videos)
    for name in ("0.mp4", "0.txt"):
        (tmp_path / "set" / name).symlink_to(videos / name)
    found = VideoFolder(tmp_path / "set", **SIZE, progress=False)
    assert not found.rejects and len(found) == 4 and all(sample.caption for sample in found.samples)


@pytest.mark.parametrize("name", ["0.txt", "metadata.jsonl", "metadata.csv"])
def test_words_without_end_are_refused(videos, tmp_path, name, monkeypatch):
    from stgen import dataset, listing

    monkeypatch.setattr(listing, "MAX_CAPTION", 1000)
    monkeypatch.setattr(listing, "MAX_METADATA", 1000)
    folder = shutil.copytree(videos, tmp_path / "set")
    (folder / name).write_text("x" * 1001)
    if name == "0.txt":
        found = VideoFolder(folder, **SIZE, max_reject_fraction=1.0, progress=False)
        assert any(reject.path == "0.txt" and "1000 bytes" in reject.reason for reject in found.rejects)
    else:
        with pytest.raises(dataset.DataError, match=rf"{name}.*1000 bytes"):
            VideoFolder(folder, **SIZE, max_reject_fraction=1.0, progress=False)


def test_the_guard_sees_what_it_is_to_see(tmp_path):
    """A guard that is blind would let everything pass."""
    import socket

    with (
        pytest.raises(AssertionError, match=r"socket.connect"),
        guarded(),
        pytest.raises(OSError),
        socket.socket() as s,
    ):
        s.connect(("127.0.0.1", 9))
    with pytest.raises(AssertionError, match="secret"), guarded():
        (tmp_path / "secret").write_text("x")


def test_build_knows_every_group_that_a_checkpoint_holds(trained):
    assert {path.stem for path in trained.glob("*.safetensors")} == set(build.GROUPS)
