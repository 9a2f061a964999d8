"""A two-layer attention-only GPT-2 whose weights are set by hand: one previous-token head, one induction head.

The residual stream has four slots of one-hot features, each feature a ± pair of coordinates so that
LayerNorm's mean is 0 everywhere: token, position, previous token, prediction.

- L0H1 matches position p with position p-1 and copies the token there into the previous-token slot.
- L1H2 matches its token with the previous-token slot and copies the token there into the prediction.

All other heads have zero weights: they attend evenly and write nothing. The MLPs are zero.
"""

import string

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.ground_truth.blank import blank_gpt2, slot

SYMBOLS = ["<bos>", "<unk>", *string.ascii_lowercase, *"ABCDEFGHIJKLMNOPQRST ,.;'\"-!?\n"]
D_VOCAB, N_CTX, N_HEADS = len(SYMBOLS), 64, 4
TOKEN, POSITION, PREVIOUS, PREDICTION = 0, D_VOCAB, D_VOCAB + N_CTX, 2 * D_VOCAB + N_CTX
D_MODEL = 2 * (3 * D_VOCAB + N_CTX)
PREVIOUS_TOKEN_HEAD, INDUCTION_HEAD = (0, 1), (1, 2)


def induction_model() -> GPT2LMHeadModel:
    """The model, in eval mode."""
    model = blank_gpt2(
        vocab_size=D_VOCAB,
        n_positions=N_CTX,
        n_embd=D_MODEL,
        n_layer=2,
        n_head=N_HEADS,
        n_inner=4,
    )
    with torch.no_grad():
        body = model.transformer
        body.wte.weight.copy_(slot(TOKEN, D_VOCAB, D_MODEL))
        body.wpe.weight.copy_(slot(POSITION, N_CTX, D_MODEL))
        _head(
            model,
            PREVIOUS_TOKEN_HEAD,
            query=POSITION,
            key=POSITION,
            width=N_CTX,
            shift=1,
            out=PREVIOUS,
        )
        _head(
            model, INDUCTION_HEAD, query=TOKEN, key=PREVIOUS, width=D_VOCAB, shift=0, out=PREDICTION
        )
        model.lm_head.weight.copy_(slot(PREDICTION, D_VOCAB, D_MODEL))
    return model


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character of SYMBOLS; anything else is <unk>."""
    tokenizer = Tokenizer(
        models.WordLevel({s: i for i, s in enumerate(SYMBOLS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>")


def _head(
    model, place: tuple[int, int], *, query: int, key: int, width: int, shift: int, out: int
) -> None:
    """Attend from feature i + shift of slot `query` to feature i of slot `key`; copy tokens into `out`."""
    layer, head = place
    attention = model.transformer.h[layer].attn
    d_head = D_MODEL // N_HEADS
    first = head * d_head
    W_Q, W_K = slot(query, width, D_MODEL), slot(key, width, D_MODEL)
    columns = torch.arange(width - shift)
    attention.c_attn.weight[:, first + columns] = W_Q[shift:].T
    attention.c_attn.weight[:, D_MODEL + first + columns] = W_K[: width - shift].T
    tokens = torch.arange(D_VOCAB)
    attention.c_attn.weight[:, 2 * D_MODEL + first + tokens] = slot(TOKEN, D_VOCAB, D_MODEL).T
    # LayerNorm has multiplied the ± pair by about 10 and reading it gives twice that: write about 1.
    attention.c_proj.weight[first + tokens] = slot(out, D_VOCAB, D_MODEL) / 20
