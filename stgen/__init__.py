"""stgen: train, sample and ablate video diffusion transformers.

The public classes load on first use, so that `import stgen` and `--help` stay fast and torch-free.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "VideoTransformer": "stgen.model",
    "VideoPipeline": "stgen.pipeline",
    "PatchPCA": "stgen.codec",
    "Pixels": "stgen.codec",
    "LearnedTextEncoder": "stgen.text",
    "adapt": "stgen.adapters",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'stgen' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
