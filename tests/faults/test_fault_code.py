"""Nothing in the package can be made to run what it reads: judged from the source, call by call.

Each rule is proved on a line that breaks it, so that none can fall silent.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    [*(ROOT / "stgen").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), ROOT / "train.py", ROOT / "sample.py"]
)

PICKLES = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "code",
    "codeop",
    "pty",
}
NETWORK = {"socket", "ssl", "http", "urllib.request", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "telnetlib"}
SHELLS = {"system", "popen", "popen2", "popen3", "startfile", "execl", "execle", "execlp", "execlpe", "execv", "execve"}
SHELLS |= {"execvp", "execvpe", "spawnl", "spawnle", "spawnlp", "spawnv", "spawnve", "spawnvp", "spawnvpe", "getoutput"}
SHELLS |= {"getstatusoutput"}
PROCESSES = {"run", "call", "check_call", "check_output", "Popen"}
YAML_LOADERS = {"load", "load_all", "full_load", "unsafe_load", "unsafe_load_all"}
ALLOWED = {  # file: rule: why it may
    "stgen/attention/patterns/__init__.py": {"dynamic import"},  # of the files beside it, by pkgutil
    "stgen/__init__.py": {"dynamic import"},  # of its own public names, from a constant table
    "stgen/lab/doctor.py": {"dynamic import"},  # of packages named in a constant, to tell their versions
    "stgen/metrics/features.py": {
        "torchscript"
    },  # FVD's network exists as a program alone; SECURITY.md says whom to trust
    "stgen/testing/compiled.py": {"dynamic import"},  # of the kernels' test files, named by a developer
    "stgen/testing/mutants.py": {"dynamic import"},  # of a changed copy of a kernel's own source
}


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((k.value for k in call.keywords if k.arg == name), None)


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def dotted(node: ast.expr) -> str:
    """`torch.load` for the function of a call; what cannot be written so is empty."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def of_imports(node: ast.AST) -> Iterator[str]:
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    for name in names:
        parts = name.split(".")
        prefixes = {".".join(parts[: i + 1]) for i in range(len(parts))}
        if prefixes & PICKLES:
            yield "pickle"
        if prefixes & NETWORK:
            yield "network"
        if prefixes & {f"os.{name}" for name in SHELLS} | prefixes & {f"subprocess.{name}" for name in SHELLS}:
            yield "shell"


def of_calls(call: ast.Call) -> Iterator[str]:
    name = dotted(call.func)
    home, _, last = name.rpartition(".")
    if (isinstance(call.func, ast.Name) and name in ("eval", "exec", "compile", "__import__")) or home == "builtins":
        yield "eval"
    if name in ("importlib.import_module", "import_module", "importlib.__import__") or last == "exec_module":
        yield "dynamic import"
    if home in ("os", "posix", "subprocess", "commands") and last in SHELLS:
        yield "shell"
    if (shell := keyword(call, "shell")) is not None and not is_constant(shell, False):
        yield "shell"
    if home in ("subprocess", "") and last in PROCESSES and call.args and isinstance(call.args[0], ast.JoinedStr):
        yield "shell"  # a command line put together of text
    if name == "torch.jit.load":
        yield "torchscript"
    if last == "load" and home in ("torch", "torch.hub", "torch.package"):
        weights_only = keyword(call, "weights_only")
        if home != "torch" or not is_constant(weights_only, True):
            yield "torch.load"
    if (weights_only := keyword(call, "weights_only")) is not None and not is_constant(weights_only, True):
        yield "torch.load"
    if (allowed := keyword(call, "allow_pickle")) is not None and not is_constant(allowed, False):
        yield "pickle"
    if home == "yaml" and last in YAML_LOADERS:
        yield "yaml"
    if name == "YAML" and not (isinstance(kind := keyword(call, "typ"), ast.Constant) and kind.value in ("safe", "rt")):
        yield "yaml"
    if (trust := keyword(call, "trust_remote_code")) is not None and not is_constant(trust, False):
        yield "remote code"
    if last == "from_pretrained" and not _is_safe(call):
        yield "weights without safetensors"
    if last in ("extractall", "unpack_archive", "mktemp"):
        yield "archive"


def _is_safe(call: ast.Call) -> bool:
    """Whether a loader of weights takes safetensors alone; configs and tokenizers hold no tensors."""
    name = dotted(call.func)
    if any(word in name for word in ("AutoConfig", "AutoTokenizer", "VideoPipeline", "VideoTransformer")):
        return True
    spread = [k.value for k in call.keywords if k.arg is None]
    pairs = [pair for d in spread if isinstance(d, ast.Dict) for pair in zip(d.keys, d.values, strict=True)]
    inside = [value for key, value in pairs if isinstance(key, ast.Constant) and key.value == "use_safetensors"]
    return is_constant(keyword(call, "use_safetensors"), True) or any(is_constant(v, True) for v in inside)


def of_strings(node: ast.AST) -> Iterator[str]:
    """{"trust_remote_code": True} handed on by **."""
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "trust_remote_code" and not is_constant(value, False):
                yield "remote code"


def faults(source: str) -> list[tuple[int, str]]:
    """(line, rule) of everything in a file that breaks a rule."""
    found = []
    for node in ast.walk(ast.parse(source)):
        broken = [*of_imports(node), *of_strings(node)]
        broken += of_calls(node) if isinstance(node, ast.Call) else []
        found += [(getattr(node, "lineno", 0), rule) for rule in dict.fromkeys(broken)]
    return found


def test_no_source_breaks_a_rule(figure):
    assert len(SOURCES) > 100
    broken = []
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        allowed = ALLOWED.get(name, set())
        broken += [f"{name}:{line}: {rule}" for line, rule in faults(path.read_text()) if rule not in allowed]
    assert not broken, "\n".join(broken)
    figure("source files without pickle, eval, shell, remote code, sockets or unsafe loaders", len(SOURCES))


def test_what_is_allowed_is_there():
    """An exception that nothing needs any more is taken out."""
    for name, rules in ALLOWED.items():
        assert rules == {rule for _, rule in faults((ROOT / name).read_text())}, name


BROKEN = {
    "import pickle": "pickle",
    "from pickle import loads": "pickle",
    "import marshal as m": "pickle",
    "from joblib import load": "pickle",
    "np.load(path, allow_pickle=True)": "pickle",
    "eval(text)": "eval",
    "exec(compile(text, 'x', 'exec'))": "eval",
    "__import__(name)": "eval",
    "builtins.eval(text)": "eval",
    "importlib.import_module(name)": "dynamic import",
    "spec.loader.exec_module(module)": "dynamic import",
    "os.system('ls')": "shell",
    "from os import system": "shell",
    "os.popen(command)": "shell",
    "os.execvp(file, args)": "shell",
    "subprocess.run(command, shell=True)": "shell",
    "subprocess.run(command, shell=wanted)": "shell",
    "subprocess.getoutput(command)": "shell",
    "subprocess.run(f'ls {folder}')": "shell",
    "torch.load(path)": "torch.load",
    "torch.load(path, weights_only=False)": "torch.load",
    "torch.hub.load(repository, model)": "torch.load",
    "torch.jit.load(path)": "torchscript",
    "load_checkpoint(path, weights_only=wanted)": "torch.load",
    "yaml.load(text)": "yaml",
    "yaml.unsafe_load(text)": "yaml",
    "YAML(typ='unsafe')": "yaml",
    "YAML()": "yaml",
    "AutoModel.from_pretrained(path, use_safetensors=True, trust_remote_code=True)": "remote code",
    "AutoModel.from_pretrained(path, use_safetensors=True, trust_remote_code=wanted)": "remote code",
    "load(**{'trust_remote_code': True})": "remote code",
    "AutoModel.from_pretrained(path)": "weights without safetensors",
    "AutoModel.from_pretrained(path, use_safetensors=False)": "weights without safetensors",
    "import socket": "network",
    "from urllib import request": "network",
    "import requests": "network",
    "tar.extractall(folder)": "archive",
    "tempfile.mktemp()": "archive",
}


@pytest.mark.parametrize("line", BROKEN)
def test_a_line_that_breaks_a_rule_is_found(line):
    assert (1, BROKEN[line]) in faults(line)


WHOLE = [
    "model.eval()", "re.compile(pattern)", "torch.compile(model)", "torch.load(path, weights_only=True)", "load_file(path)",
    "subprocess.run([sys.executable, '-c', code])", "from urllib.parse import urlsplit", "YAML(typ='safe', pure=True)",
    "AutoConfig.from_pretrained(path, trust_remote_code=False)", "yaml.dump(tree, text)", "json.load(file)",
    "AutoModel.from_pretrained(path, use_safetensors=True)", "super().from_pretrained(f, **{**o, 'use_safetensors': True})",
    "np.load(path)",
]  # fmt: skip


@pytest.mark.parametrize("line", WHOLE)
def test_a_line_that_breaks_none_is_left_alone(line):
    assert not faults(line)
