"""The quickstart cut to a minute: the README's first command learns what its oracle can read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_900_steps_of_the_quickstart_learn_colours_and_directions(tmp_path):
    run = tmp_path / "run"
    command = [
        sys.executable, "train.py", "configs/quickstart.yaml", f"run.output_dir={run}", "train.max_train_seconds=null",
        "train.max_train_steps=900", "data.shapes.clips=1200", "validation.judged_noises=10", "log.wandb=offline",
    ]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    for words in ("contact sheet", "checkpoint", "W&B", "never trained", "python sample.py"):
        assert words in result.stdout, result.stdout
    summary = json.loads((run / "summary.json").read_text())
    detail = summary["accuracy_detail"]
    # Chance is 2 % for a whole prompt, 25 % for a colour or a direction.
    assert detail["seen"]["colour"] > 0.9 and detail["seen"]["direction"] > 0.8 and detail["seen"]["all"] > 0.1
    assert detail["real"]["all"] > 0.95

    prompt = ["--prompt", "a blue square moving left", "--seed", "0", "--output", "mp4", "gif", "sheet"]
    result = subprocess.run(
        [sys.executable, "sample.py", str(run), *prompt], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert {"000-seed0.mp4", "000-seed0.gif", "000-seed0.json", "contact_sheet.png"} <= {
        f.name for f in (run / "samples").iterdir()
    }
