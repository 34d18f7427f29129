"""stgen doctor: what it calls working works, what it calls broken is broken, and it keeps keys to itself."""

from typing import Literal

import pytest
import torch

from stgen import video
from stgen.lab import doctor
from stgen.lab.doctor import Line, Report, Trial, trial_error

CPU = torch.device("cpu")


def fake(x, impl: Literal["auto", "reference", "triton"] = "auto"):
    """An operation whose kernels do something else, as FAKE says."""
    if impl != "triton":
        return 2 * x
    if isinstance(FAKE["kernels"], Exception):
        raise FAKE["kernels"]
    return FAKE["kernels"](x)


FAKE = {"kernels": lambda x: 2 * x}
TRIAL = Trial(f"{__name__}:fake", lambda op, make, impl: (op(make(4, 4), impl=impl),))


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return lambda what: monkeypatch.setitem(FAKE, "kernels", what)


def test_the_whole_report(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-key")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(doctor, "AHEAD", "print('{target} is fine')")
    report, printed = doctor.doctor(), capsys.readouterr().out
    lines = {line.name: line for line in report.lines}
    assert {"python", "torch", "triton", "cpu", "video", "W&B", "triton's cache"} <= lines.keys()
    assert lines.keys() >= doctor.TRIALS.keys()
    assert all(str(line) in printed for line in report.lines) and report.verdict in printed
    assert report.can_train, report.verdict
    assert lines["W&B"].words.startswith("online") and "a-secret-key" not in printed
    assert lines["compiling ahead of time"].words.endswith("is fine")
    assert lines["video"].state == "ok"
    if not torch.cuda.is_available():
        assert "runs in PyTorch here: reference" in lines["norm_rope"].words
        assert lines["gpu"].state == "note"


@pytest.mark.parametrize("name", doctor.TRIALS)
def test_a_trial_of_the_definition_agrees_with_itself_and_has_gradients(name):
    trial = doctor.TRIALS[name]
    if "reference" in doctor._impls(trial.load()):
        assert trial_error(trial, CPU, torch.float32, "reference") < 1e-6


@pytest.mark.parametrize("name", doctor.TRIALS)
def test_kernels_are_tried_where_they_run(name, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    line = doctor._kernels(name, doctor.TRIALS[name])
    assert line.state == "ok", line
    if "triton" in doctor._impls(doctor.TRIALS[name].load()):
        assert "the kernels work" in line.words


def test_right_kernels_are_told_from_wrong_ones(kernels):
    assert doctor._kernels("fake", TRIAL).state == "ok"
    kernels(lambda x: 2.01 * x)
    line = doctor._kernels("fake", TRIAL)
    assert line.state == "FAIL" and "wrong" in line.words and line.advice
    kernels(lambda x: 2 * x.detach() + 0 * x)  # right forward, no gradient
    assert doctor._kernels("fake", TRIAL).state == "FAIL"
    kernels(lambda x: 2 * x * torch.nan)
    assert doctor._kernels("fake", TRIAL).state == "FAIL"


def test_kernels_that_do_not_compile_leave_the_work_to_pytorch(kernels):
    kernels(RuntimeError("no such target: sm_42\nand a long story"))
    line = doctor._kernels("fake", TRIAL)
    assert line.state == "note" and line.words.endswith("no such target: sm_42")
    assert "runs in PyTorch here: reference" in line.words


def test_without_triton_pytorch_does_the_work(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "triton" else "1.0")
    assert doctor._triton().state == "note" and "pip install" in doctor._triton().advice
    line = doctor._kernels("fake", TRIAL)
    assert line.state == "note" and "triton is missing" in line.words and line.advice
    assert doctor._ahead().state == "note"


def test_an_operation_that_is_missing_or_has_no_kernels():
    assert doctor._kernels("fake", Trial("stgen.ops.nowhere:op", TRIAL.call)).state == "FAIL"
    without = Trial(f"{__name__}:test_an_operation_that_is_missing_or_has_no_kernels", TRIAL.call)
    assert doctor._kernels("fake", without).words == "runs in PyTorch here: reference"


def test_what_training_needs_decides_the_verdict(monkeypatch):
    assert Report([Line("a", "ok", ""), Line("b", "note", "")]).can_train
    assert not Report([Line("a", "ok", ""), Line("b", "FAIL", "")]).can_train
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "einops" else "1.0")
    assert [line.state for line in doctor._libraries()] == ["ok", "FAIL"]


def test_an_encoder_that_fails_is_named(monkeypatch):
    def write(path, clip, written=video.write):
        if path.suffix == broken:
            raise video.VideoError(path, "no encoder\nfor it")
        written(path, clip)

    monkeypatch.setattr(video, "write", write)
    for broken, state in ((".webm", "note"), (".mp4", "FAIL")):
        line = doctor._video()
        assert line.state == state and line.words == f"{broken}: no encoder" and line.advice


def test_a_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file/cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not/yet/there"))
    lines = {line.name: line for line in doctor._folders()}
    assert lines["triton's cache"].state == "note" and "TRITON_CACHE_DIR" in lines["triton's cache"].advice
    assert lines["model cache"].state == "ok" and not (tmp_path / "not").exists()


def test_compiling_ahead_of_time_is_tried_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which that process is spared
    monkeypatch.setattr(doctor, "AHEAD", "import os; print('{target}', os.environ.get('TRITON_INTERPRET'))")
    line = doctor._ahead()
    assert line.state == "ok" and line.words == "for sm_90: sm_90 None"
    monkeypatch.setattr(doctor, "AHEAD", "raise ValueError('{target} is not known')")
    line = doctor._ahead()
    assert line.state == "note" and "ValueError: sm_90 is not known" in line.words


@pytest.mark.slow
def test_a_kernel_compiles_ahead_of_time():
    line = doctor._ahead()
    assert line.state == "ok" and "registers" in line.words, line
