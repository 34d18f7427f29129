"""Text encoders: what of a prompt reaches the model, what padding must not change, and which folders are refused."""

import json

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)

from stgen import text
from stgen.text import END, PAD, LearnedTextEncoder, TextError, encode, load_pretrained

CAPTIONS = ["a red circle", "A blue square, moving left!", "it's"]
HOSTILE = ["../../x", "red " * 400, "a\0b", "☃ 🎬 é", "\udce9", "   ", ""]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(params=["words", "bytes"])
def encoder(request):
    torch.manual_seed(0)
    vocabulary = text.vocabulary_of(CAPTIONS) if request.param == "words" else None
    return LearnedTextEncoder(vocabulary, width=64, max_length=8).eval()


# ---------------------------------------------------------------------------------------------------------- learned


def test_words():
    assert text.words_of("A red-hot circle, it's ÉTÉ 2 _x_!") == [
        "a", "red", "-", "hot", "circle", ",", "it's", "été", "2", "x", "!",
    ]  # fmt: skip
    assert text.vocabulary_of(CAPTIONS) == sorted(
        ["a", "red", "circle", "blue", "square", ",", "moving", "left", "!", "it's"]
    )


def test_unknown_words_are_left_out():
    encoder = LearnedTextEncoder(text.vocabulary_of(CAPTIONS))
    ids, _ = encoder.tokenize(["a huge red dog"])
    assert ids.tolist() == encoder.tokenize(["a red"])[0].tolist() and ids.shape == (1, 3) and ids[0, -1] == END
    assert encoder.unknown_words("a Huge red dog") == ["huge", "dog"]
    assert encoder.unknown_words("A RED circle") == []
    assert LearnedTextEncoder(None, width=64).unknown_words("anything") == []


def test_bytes_are_those_of_utf8():
    ids, mask = LearnedTextEncoder(None, width=64).tokenize(["é☃"])
    assert ids.tolist() == [[byte + 2 for byte in "é☃".encode()] + [END]] and mask.all()


def test_truncation_keeps_the_end_token(encoder):
    ids, mask = encoder.tokenize(["a red circle moving left " * 20, "red"])
    assert ids.shape == (2, 8) and ids[0, -1] == END and mask[0].all()
    assert int((ids[1] == END).sum()) == 1 and (ids[1][~mask[1]] == PAD).all()
    shortest = LearnedTextEncoder(["a"], max_length=1)
    assert shortest.tokenize(["a a a"])[0].tolist() == [[END]]


def test_the_empty_prompt_is_one_token(encoder):
    for empty in ("", "  "):
        ids, mask = encoder.tokenize([empty] if encoder.config.vocabulary else [""])
        assert ids.tolist() == [[END]] and mask.tolist() == [[True]]
    assert encoder.tokenize(["", "a red circle"])[1].sum(1)[0] == 1


@torch.no_grad()
def test_padding_has_no_effect(encoder):
    alone, mask = encode(encoder, None, ["red"])
    beside, wide = encode(encoder, None, ["red", "a blue square, moving left"])
    assert beside.shape[1] > alone.shape[1] and wide[0].sum() == mask[0].sum()
    assert torch.allclose(beside[0][wide[0]], alone[0][mask[0]], atol=1e-5)


@torch.no_grad()
def test_places_matter_once_they_are_trained(encoder):
    torch.nn.init.normal_(encoder.places.weight)
    first, _ = encode(encoder, None, ["red a"])
    second, _ = encode(encoder, None, ["a red"])
    assert not torch.allclose(first.sum(1), second.sum(1), atol=1e-3) or not torch.allclose(first, second, atol=1e-3)


def test_a_learned_encoder_has_gradients(encoder):
    embeds, _ = encode(encoder, None, ["a red circle"])
    embeds.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters())


@torch.no_grad()
def test_save_and_load(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = LearnedTextEncoder.from_pretrained(tmp_path, use_safetensors=True)
    for prompts in (["a red dog", ""], HOSTILE):
        first, mask = encode(encoder, None, prompts)
        second, same = encode(loaded, None, prompts)
        assert torch.equal(first, second) and torch.equal(mask, same) and first.isfinite().all()


# ------------------------------------------------------------------------------------------------------- pretrained


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<bos>", "<eos>", "<unk>", *text.vocabulary_of(CAPTIONS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<bos>", 0), ("<eos>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A <eos>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    )


def t5(config=T5Config, model=T5EncoderModel):
    options = dict(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return model(config(**options, decoder_start_token_id=0))


def umt5():
    return t5(UMT5Config, UMT5EncoderModel)


def clip():
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=10, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip


ENCODERS = [(t5, ByT5Tokenizer), (umt5, word_tokenizer), (clip, word_tokenizer)]


@pytest.mark.parametrize(("make", "tokenizer"), ENCODERS, ids=["t5", "umt5", "clip"])
@pytest.mark.parametrize("split", [False, True], ids=["one folder", "as in a diffusers pipeline"])
def test_pretrained_encoders(make, tokenizer, split, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "text_encoder" if split else tmp_path)
    tokenizer().save_pretrained(tmp_path / "tokenizer" if split else tmp_path)
    encoder, loaded, width = load_pretrained(str(tmp_path), "text_encoder" if split else None)
    assert type(encoder) is type(model) and width == 16
    assert not encoder.training and not any(parameter.requires_grad for parameter in encoder.parameters())

    embeds, mask = encode(encoder, loaded, ["", "a red circle"])
    assert embeds.shape == (*mask.shape, 16) and embeds.dtype == torch.float32 and mask.dtype == torch.bool
    assert not embeds.requires_grad and 1 <= mask[0].sum() <= 2 < mask[1].sum()
    ids = loaded(["a red circle"], return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(embeds[1][mask[1]], model(input_ids=ids)[0][0], atol=1e-5)
    alone, only = encode(encoder, loaded, [""])
    assert torch.allclose(alone[0][only[0]], embeds[0][mask[0]], atol=1e-5)

    longest = 10 if make is clip else 12
    embeds, mask = encode(encoder, loaded, ["red " * 100], max_length=12)
    assert embeds.shape == (1, longest, 16) and embeds.isfinite().all()
    assert loaded(["red " * 100], truncation=True, max_length=longest).input_ids[0][-1] == loaded.eos_token_id


def refused(path, *args) -> str:
    with pytest.raises(TextError) as refusal:
        load_pretrained(str(path), *args)
    message = str(refusal.value)
    assert message.startswith("text.path: ") and "\n" not in message
    return message


def test_folders_that_hold_no_encoder(tmp_path):
    refused(tmp_path / "missing")
    refused(tmp_path)
    refused("someone/something")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    refused(tmp_path)


def test_an_encoder_without_tokenizer_pickled_or_partial(tmp_path):
    from safetensors.torch import load_file, save_file

    t5().save_pretrained(tmp_path / "alone")
    refused(tmp_path / "alone")
    model = t5()
    model.save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    gone = "encoder.block.0.layer.0.SelfAttention.q.weight"
    save_file({name: x for name, x in tensors.items() if name != gone}, weights, {"format": "pt"})
    assert refused(tmp_path).endswith(f"lacks 1 weights of T5EncoderModel, {gone} among them")
    weights.write_bytes(weights.read_bytes()[:100])
    refused(tmp_path)
    weights.unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    refused(tmp_path)


def test_of_a_whole_t5_only_the_encoder_is_loaded(tmp_path):
    t5(model=T5ForConditionalGeneration).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    assert isinstance(load_pretrained(str(tmp_path))[0], T5EncoderModel)
