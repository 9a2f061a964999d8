"""A BERT whose first layer holds one head of every kind that encoders have, weights set by hand.

As in `vision_model`: one-hot ± pairs for tokens, for positions and one constant pair; heads write nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests.ground_truth.induction_model import SYMBOLS
from tests.ground_truth.vision_model import one_hot_pairs

WORDS = [*SYMBOLS, "[CLS]", "[SEP]"]
D_VOCAB, N_CTX = len(WORDS), 64
CLS, SEP = D_VOCAB - 2, D_VOCAB - 1
CONSTANT = D_VOCAB + N_CTX
D_HEAD = CONSTANT + 1
AHEAD = 3

QK = tuple[Tensor, Tensor]
"""What each dimension of q and of k reads: [D_HEAD features] each."""


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; [CLS] and [SEP] around texts as BERT's tokenizer puts them."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="<bos>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _shift(shift: int) -> QK:
    """Query at p, key at p + shift."""
    q, k = torch.zeros(D_HEAD, D_HEAD), torch.zeros(D_HEAD, D_HEAD)
    for p in range(N_CTX):
        q[p, D_VOCAB + p] = 1.0
        if 0 <= p + shift < N_CTX:
            k[p, D_VOCAB + p + shift] = 1.0
    return q, k


def _any_query(*features: int, strength: float = 1.0) -> QK:
    """Any query, keys with one of these features."""
    q, k = torch.zeros(D_HEAD, D_HEAD), torch.zeros(D_HEAD, D_HEAD)
    q[0, CONSTANT] = 1.0
    k[0, list(features)] = strength
    return q, k


def _delimiters() -> QK:
    return _any_query(*(i for i, symbol in enumerate(SYMBOLS) if symbol in ",.;'\"-!?\n"))


def _cls_apart() -> QK:
    """CLS asks for nothing and so reads everything; all others look at separators."""
    q, k = _any_query(SEP)
    q[0, CLS] = -1.0
    return q, k


ENCODER_ZOO: dict[str, Callable[[], QK]] = {
    "previous_token": lambda: _shift(-1),
    "next_token": lambda: _shift(1),
    "fixed_offset": lambda: _shift(AHEAD),
    "current_token": lambda: _shift(0),
    "separator": lambda: _any_query(SEP),
    "cls": lambda: _any_query(CLS),
    "separator,cls_reads": _cls_apart,
    "delimiter": _delimiters,
    "broad": lambda: _any_query(*range(0, len(SYMBOLS), 2), strength=0.055),
    "": lambda: (torch.zeros(D_HEAD, D_HEAD),) * 2,
}
"""The labels each head of layer 0 should get, in order of heads."""


def encoder_zoo() -> BertModel:
    """The model, in eval mode."""
    d_model = D_HEAD * len(ENCODER_ZOO)
    config = BertConfig(
        vocab_size=D_VOCAB,
        hidden_size=d_model,
        num_hidden_layers=1,
        num_attention_heads=len(ENCODER_ZOO),
        intermediate_size=4,
        max_position_embeddings=N_CTX,
        pad_token_id=0,
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    pairs = one_hot_pairs(D_HEAD, d_model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" not in name:
                parameter.zero_()
        found = dict(model.named_parameters())
        found["embeddings.word_embeddings.weight"].copy_(pairs[:D_VOCAB])
        found["embeddings.position_embeddings.weight"].copy_(pairs[D_VOCAB:CONSTANT])
        found["embeddings.token_type_embeddings.weight"].copy_(pairs[CONSTANT].expand(2, -1))
        # LayerNorm multiplies each pair by sqrt(d_model / 6); undone here, a match scores 40.
        scale = (40 * D_HEAD**0.5) ** 0.5 / (2 * (d_model / 6) ** 0.5)
        for head, make in enumerate(ENCODER_ZOO.values()):
            rows = slice(head * D_HEAD, (head + 1) * D_HEAD)
            for part, weights in zip(("query", "key"), make(), strict=True):
                at = f"encoder.layer.0.attention.self.{part}.weight"
                found[at][rows] = weights @ pairs * scale
    return model
