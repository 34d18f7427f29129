"""Prompts -> embeddings [B, L, width] and a mask [B, L]; the empty prompt is a prompt like any other.

The learned encoder is the offline default and knows only the words (or bytes) of its training captions. T5, UMT5 and
CLIP come from transformers; they are frozen.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional

PAD, END = 0, 1
_RESERVED = 2


class TextError(ValueError):
    """An encoder that cannot be had; one sentence that says what to do."""


def words_of(prompt: str) -> list[str]:
    """Lower-case words and single punctuation marks."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?|[^\w\s]", prompt.lower())


def vocabulary_of(captions: Iterable[str]) -> list[str]:
    """Every word of the captions, sorted."""
    return sorted({word for caption in captions for word in words_of(caption)})


class LearnedTextEncoder(ModelMixin, ConfigMixin):
    """A small encoder trained with the model, over words or bytes.

    Words are embedded one by one (plus a place); bytes pass two transformer layers, since single bytes mean little.

    Args:
        vocabulary: the words known; None reads bytes.
        width: channels of an embedding.
        max_length: tokens kept of a prompt, the end token included.
    """

    config: Any  # diffusers declares a plain dict; it also reads by attribute

    @register_to_config
    def __init__(self, vocabulary: list[str] | None, width: int = 128, max_length: int = 32):
        super().__init__()
        self._ids = None if vocabulary is None else {word: i + _RESERVED for i, word in enumerate(vocabulary)}
        self.embed = nn.Embedding(_RESERVED + (256 if vocabulary is None else len(vocabulary)), width)
        self.places = nn.Embedding(max_length, width)
        nn.init.zeros_(self.places.weight)
        self.layers = None
        if vocabulary is None:
            heads = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
            layer = nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            self.layers = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids [B, L] and mask [B, L], padded to the longest prompt; long prompts are cut, the end token stays."""
        rows = [self._encode(prompt)[: self.config.max_length - 1] + [END] for prompt in prompts]
        ids = torch.full((len(rows), max(map(len, rows))), PAD)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return ids, ids != PAD

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, L] -> [B, L, width]."""
        x = self.embed(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        return x if self.layers is None else self.layers(x, src_key_padding_mask=~mask)

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of a prompt that no training caption held (none for bytes)."""
        return [] if self._ids is None else [word for word in words_of(prompt) if word not in self._ids]

    def _encode(self, prompt: str) -> list[int]:
        if self._ids is None:
            return [byte + _RESERVED for byte in prompt.encode(errors="replace")]
        # A word never trained has no embedding but a random one; better to leave it out, and say so.
        return [self._ids[word] for word in words_of(prompt) if word in self._ids]


def encode(
    text_encoder: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_length: int = 128,
    device: Any = None,
) -> tuple[Tensor, Tensor]:
    """Embeddings [B, L, width] and mask [B, L] of prompts, computed on `device`; None: where the encoder's weights lie.

    A learned encoder keeps its gradient and its own length. A pretrained one (tokenizer given) runs without gradient, and
    prompt by prompt: an embedding does not depend, in the last bits, on its neighbours, so that it can be kept.
    """
    device = text_encoder.device if device is None else device
    if tokenizer is None:
        ids, mask = (x.to(device) for x in text_encoder.tokenize(prompts))
        return text_encoder(ids, mask), mask
    if isinstance(text_encoder, KnownPrompts):
        rows = [text_encoder.embedding(prompt) for prompt in prompts]
    else:
        rows = [_embedding(text_encoder, tokenizer, prompt, max_length, device) for prompt in prompts]
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    mask = torch.arange(max(1, int(lengths.max())), device=rows[0].device) < lengths[:, None]  # [B, L]
    return torch.stack([functional.pad(row, (0, 0, 0, mask.shape[1] - len(row))) for row in rows]), mask


@torch.no_grad()
def _embedding(text_encoder: Any, tokenizer: Any, prompt: str, max_length: int, device: torch.device | str) -> Tensor:
    """[L, width] of one prompt, its own tokens alone."""
    tokens = tokenizer([prompt], truncation=True, max_length=longest(text_encoder, max_length), return_tensors="pt")
    ids, mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)
    if not ids.numel():  # the empty prompt of a tokenizer without an end token
        return torch.zeros(0, width_of(text_encoder), device=device)
    return text_encoder(input_ids=ids, attention_mask=mask)[0][0].float()


def longest(text_encoder: Any, max_length: int) -> int:
    """Tokens kept of a prompt: CLIP has 77 places."""
    return min(max_length, getattr(text_encoder.config, "max_position_embeddings", max_length))


class KnownPrompts(nn.Module):
    """Stands where a frozen encoder would, and looks the embeddings of known prompts up: [L, width] of each."""

    place: Tensor

    def __init__(self, look_up: Callable[[str], Tensor]):
        super().__init__()
        self._look_up = look_up
        self.register_buffer("place", torch.empty(0), persistent=False)  # its device is where embeddings go

    @property
    def device(self) -> torch.device:
        return self.place.device

    def embedding(self, prompt: str) -> Tensor:
        """[L, width], on the module's device."""
        return self._look_up(prompt).to(self.device)


def load_pretrained(path: str, subfolder: str | None = None, local: bool = False) -> tuple[Any, Any, int]:
    """A frozen text encoder, its tokenizer and the width of its embeddings; safetensors only; `local` fetches nothing.

    Raises TextError when the folder holds none: a missing encoder is never replaced by another.
    """
    import transformers

    # AutoModel on a T5 folder would load the decoder too.
    classes = {
        "t5": "T5EncoderModel",
        "umt5": "UMT5EncoderModel",
        "clip": "CLIPTextModel",
        "clip_text_model": "CLIPTextModel",
    }
    where = {"subfolder": subfolder} if subfolder else {}
    safe = {"trust_remote_code": False, "local_files_only": local}  # left open, code in the folder is asked about
    try:
        kind = transformers.AutoConfig.from_pretrained(path, **where, **safe).model_type
        loader = getattr(transformers, classes.get(kind, "AutoModel"))
        encoder, report = loader.from_pretrained(path, use_safetensors=True, output_loading_info=True, **where, **safe)
        tokenizer = _load_tokenizer(transformers, path, where, safe)
    except Exception as error:  # whatever a damaged or hostile folder provokes
        raise TextError(f"text.path: no text encoder with tokenizer at {path}: {_first_line(error)}") from None
    if absent := sorted(report["missing_keys"]):
        raise TextError(
            f"text.path: {path} lacks {len(absent)} weights of {type(encoder).__name__}, {absent[0]} among them"
        )
    encoder = encoder.requires_grad_(False).eval()
    return encoder, tokenizer, width_of(encoder)


def width_of(encoder: Any) -> int:
    """Channels of a pretrained encoder's embeddings."""
    return encoder.config.hidden_size if hasattr(encoder.config, "hidden_size") else encoder.config.d_model


def load_tokenizer(path: str, subfolder: str | None = None) -> Any:
    """The tokenizer of a pretrained text encoder, without the encoder. Raises TextError when there is none."""
    import transformers

    where, safe = {"subfolder": subfolder} if subfolder else {}, {"trust_remote_code": False, "local_files_only": False}
    try:
        return _load_tokenizer(transformers, path, where, safe)
    except Exception as error:  # whatever a damaged or hostile folder provokes
        raise TextError(f"text.path: no tokenizer at {path}: {_first_line(error)}") from None


def files(path: str, subfolder: str | None = None, local: bool = False) -> list[Path]:
    """The files on this machine that decide a pretrained encoder's embeddings: weights, configs, words; sorted.

    Raises TextError when there is none, as before a hub id was first loaded.
    """
    from transformers.utils import cached_file

    try:
        config = cached_file(path, "config.json", subfolder=subfolder or "", local_files_only=local)
    except (OSError, ValueError) as error:
        raise TextError(f"text.path: no text encoder at {path}: {_first_line(error)}") from None
    encoder = Path(str(config)).parent
    tokenizer = (encoder.parent if subfolder else encoder) / "tokenizer"
    names = (".json", ".safetensors", ".model", ".txt")
    found = [file for folder in (encoder, tokenizer) if folder.is_dir() for file in sorted(folder.iterdir())]
    found = [file for file in found if file.suffix in names and file.is_file()]
    if not any(file.suffix == ".safetensors" for file in found):
        raise TextError(
            f"text.path: the weights of {path} are not on this machine; load them once, by stgen data cache"
        )
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _load_tokenizer(transformers: Any, path: str, where: dict[str, str], safe: dict[str, bool]) -> Any:
    """diffusers pipelines keep the tokenizer in a folder of its own; transformers folders hold it beside the weights."""
    try:
        return transformers.AutoTokenizer.from_pretrained(path, subfolder="tokenizer", **safe)
    except (OSError, ValueError):
        folder = Path(path, *where.values())
        # For some models transformers makes up a tokenizer without words where there is none.
        if folder.is_dir() and not any(any(folder.glob(name)) for name in ("*token*", "*vocab*", "*.model")):
            raise OSError(f"{folder} holds no tokenizer") from None
        return transformers.AutoTokenizer.from_pretrained(path, **where, **safe)
