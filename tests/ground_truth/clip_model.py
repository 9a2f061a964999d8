"""A tiny random CLIP with a tokenizer of words, and one head that writes along a text's embedding."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from circuits.clip_parts import text_embeddings
from interp.models.weights import FrozenNorm

WORDS = [
    "<pad>",
    "<end>",
    "<unk>",
    "a",
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "line",
    "dog",
    "cat",
]
WORDS += ["on", "the", "left"]
TEXTS = [
    "a red circle",
    "a green square",
    "the blue line",
    "a dog",
    "a cat on the left",
    "green",
    "a line",
]
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
PLANTED, TEXT = (2, 1), 3
"""The head (layer, head) that `planted` makes, and the text that it writes."""


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, and <end> after them."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", pair="$A $B <end>", special_tokens=[("<end>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<end>"
    )


def tiny_clip(seed: int = 0) -> CLIPModel:
    """Random, wide enough that heads do something; gains and biases off their trivial values."""
    text = {"vocab_size": len(WORDS), "max_position_embeddings": 16}
    text |= {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    config = CLIPConfig(
        text_config=SHAPE | text,
        vision_config=SHAPE | {"image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = CLIPModel(config).eval()
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim < 2:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model


def planted(seed: int = 0) -> CLIPModel:
    """The same, one head writing to the embedding along one text's direction and nowhere else.

    u solves P (g · centre(u)) = r for the text's embedding r: with the final norm's scale held, a write
    along u moves the image embedding along r.
    """
    model = tiny_clip(seed)
    with torch.no_grad():
        r = text_embeddings(model, word_tokenizer(), TEXTS)[TEXT]
        norm = FrozenNorm(model.vision_model.post_layernorm, 32)
        centre = torch.eye(32) - 1 / 32
        to_embedding: Tensor = model.visual_projection.weight * norm.gain @ centre
        u = torch.linalg.pinv(to_embedding) @ r
        layer, head = PLANTED
        W_O = model.vision_model.encoder.layers[layer].self_attn.out_proj.weight
        read = torch.randn(8, generator=torch.Generator().manual_seed(1))
        W_O[:, 8 * head : 8 * (head + 1)] = torch.outer(u, read)
    return model


def clip_folder(path: Path, model: CLIPModel | None = None) -> str:
    """A checkpoint on disk, as a user would have it."""
    (tiny_clip() if model is None else model).save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return str(path)
