"""The house keeps its doors: which module may import which, read off the source, and what must load without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "stgen"
MODULES = {p.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): p for p in PACKAGE.rglob("*.py")}

ROOM_3 = {
    "adapters", "buckets", "build", "caches", "checkpoint", "cli", "describe", "ema", "export", "finite", "flops",
    "lab", "latent_cache", "logger", "metrics", "optim", "parallel", "preflight", "progress", "ranks", "requests", "run_folder",
    "sample", "saving", "shards", "source", "step", "train", "validation",
}  # fmt: skip
SPINE = {
    # module: what of stgen it may import
    "section": set(),
    "limits": set(),
    "distributed_spec": {"section"},
    "schedules": {"section"},
    "schema": {
        "attention.plan",
        "attention.pattern",
        "attention.patterns",
        "attention.pruning",
        "attention.reuse",
        "attention.spec",
        "data_spec",
        "distributed_spec",
        "limits",
        "lora_spec",
        "mixers.spec",
        "norm_spec",
        "section",
    },
    "norm_spec": {"schedules", "section"},
    "norms": {"norm_spec", "attention.numbers"},
    "tokens": set(),
    "members": set(),
    "video": {"members"},
    "listing": {"members", "video"},
    "samplers": {"listing"},
    "tensor_store": {"section"},
    "sizes": {"video"},
    "dataset": {"listing", "members", "samplers", "sizes", "video"},
    "tars": {"listing", "members", "video"},
    "hub": {"listing"},
    "data_spec": {"section"},
    "shapes": {"video"},
    "codec": set(),
    "text": set(),
    "mixers": {"section", "tokens", "ops.cost", "attention.pattern", "attention.layout", "attention.reuse"},
    "blocks": {"attention", "mixers", "norm_spec", "norms", "tokens", "ops"},
    "peer": {"attention", "blocks", "lora_file"},
    "model": {"attention", "mixers", "norm_spec", "norms", "tokens", "ops", "blocks", "peer"},
    "objective": set(),
    "saved": {"limits", "schema", "section"},
    "fetched": {"saved"},
    "lora_spec": {"section"},
    "lora_file": {"fetched"},
    "lora": {"lora_spec", "lora_file"},
    "pipeline": {"model", "codec", "text", "tokens", "objective", "saved", "fetched", "lora"},
}
OUTSIDE = {  # who may import these
    "av": {"stgen.video.streams", "stgen.video.writing"},
    "wandb": {"stgen.logger"},
    "triton": set(),
}


def name_of(module: str) -> str:
    return module.removesuffix(".__init__")


def imports(path: Path, module: str) -> set[str]:
    """Absolute names of everything a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: import by full name, not relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def of_stgen(path: Path, module: str) -> set[str]:
    """Modules of stgen that a file imports, without the leading `stgen.`."""
    known = {name_of(m) for m in MODULES}
    targets = set()
    for name in imports(path, module):
        while name.startswith("stgen") and name not in known:
            name = name.rpartition(".")[0]
        if name.startswith("stgen."):
            targets.add(name.removeprefix("stgen."))
    return targets


def within(target: str, rooms: set[str]) -> bool:
    return any(target == room or target.startswith(room + ".") for room in rooms)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_its_place_allows(module):
    name = name_of(module).removeprefix("stgen").lstrip(".")
    targets = of_stgen(MODULES[module], module)
    if name.startswith("ops"):
        assert all(within(t, {"ops"}) for t in targets), targets
        if name.endswith("reference"):
            assert not any(t.endswith("triton") for t in targets), targets
    elif name.startswith("attention"):
        # Pattern and spec are the rooms' common words; selection is the door of all patterns.
        allowed = {"ops", "tokens", "schedules", "section", "attention.pattern", "attention.spec"}
        allowed |= {"attention"} if name in ("attention.attend", "attention.spec") else set()
        allowed |= {"attention.patterns", "attention.layout"} if name == "attention.selection" else set()
        # Numbers stand by every room whose keys may follow a schedule.
        allowed |= (
            {"attention.numbers"} if name.split(".")[-1] in ("selection", "normalisers", "approximate") else set()
        )
        allowed |= {"attention.plan"} if name == "attention.reuse" else set()
        allowed |= {"attention.patterns"} if name == "attention.streaming" else set()
        allowed |= {"attention.patterns", "attention.reuse"} if name == "attention.pruning" else set()
        allowed |= {"attention.numbers", "attention.pruning"} if name == "attention.cascade" else set()
        allowed |= {"attention.patterns"} if name.startswith("attention.patterns.") else set()
        assert all(within(t, allowed) for t in targets), targets
    elif name.startswith("config"):
        assert all(within(t, {"config"}) for t in targets), targets
    elif name.startswith("video"):
        assert all(within(t, SPINE["video"] | {"video"}) for t in targets), targets
    elif name.startswith("mixers."):
        assert all(within(t, SPINE["mixers"] | {"mixers"}) for t in targets), targets
    elif name in SPINE:
        assert all(within(t, SPINE[name]) for t in targets), targets
    elif name.startswith("testing"):
        assert all(within(t, {"testing", "ops"}) for t in targets), targets
    elif name.startswith("metrics"):
        assert all(within(t, {"metrics"}) for t in targets), targets
    elif name.startswith("lab"):
        pass  # the laboratory looks at everything; nobody looks at it but the command line
    else:
        assert name in ROOM_3 or name in ("", "__main__"), f"{name}: give the new module its row in this table"


def test_nobody_above_imports_room_three():
    for module, path in MODULES.items():
        name = name_of(module).removeprefix("stgen").lstrip(".")
        if not within(name, ROOM_3) and name not in ("", "__main__"):
            assert not any(within(target, ROOM_3) for target in of_stgen(path, module)), module
        if not within(name, {"lab", "cli"}):
            assert not any(within(target, {"lab"}) for target in of_stgen(path, module)), module


@pytest.mark.parametrize("package", OUTSIDE)
def test_outside_libraries_have_one_door(package):
    users = {name_of(m) for m, path in MODULES.items() if any(i.split(".")[0] == package for i in imports(path, m))}
    users = {user for user in users if not user.endswith(".triton") and not user.startswith("stgen.testing")}
    assert users <= OUTSIDE[package], users


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(out.stdout.split())


def test_help_and_config_errors_load_no_torch():
    assert "torch" not in loaded_after("import stgen, stgen.cli, stgen.config, stgen.schema")


def test_ops_need_torch_alone():
    modules = loaded_after("import stgen.ops; stgen.ops.block_sparse_attention")
    assert "torch" in modules
    assert not modules & {"diffusers", "transformers", "av", "wandb", "pydantic"}
