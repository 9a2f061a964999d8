"""A two-layer GPT-2, weights set by hand, that does a task only when its prompt shows examples of it.

Sources are tokens 0 to 19, the target of source i is token 20 + i. A prompt "a A b B c" asks for C, but the
model answers only if a pair that it has read was right. Slots of one-hot features, each a ± pair of
coordinates: token, position, previous token, match, task, prediction, and one that nothing reads (every
part writes a little of it, so that on any prompt something can be seen of each).

- L0H1 writes the previous token into its slot. L0's neuron i fires where target i follows source i, and
  writes the match feature.
- L1H2 attends evenly and copies the match feature into the task slot: the head that carries the task.
- L1's neuron i fires at source i where the task feature is on, and predicts target i. Without the task the
  model repeats the source.

All other heads write nothing. Adding the task feature before layer 1 makes the model answer without examples.
"""

import string

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.ground_truth.blank import blank_gpt2, slot

N_WORDS, N_CTX, N_HEADS = 20, 16, 4
D_VOCAB = 2 * N_WORDS
TOKEN, POSITION = 0, D_VOCAB
PREVIOUS = POSITION + N_CTX
MATCH = PREVIOUS + D_VOCAB
TASK = MATCH + 1
PREDICTION = TASK + 1
UNREAD = PREDICTION + D_VOCAB
D_MODEL = 2 * (UNREAD + D_VOCAB)
PREVIOUS_TOKEN_HEAD, TASK_HEAD = (0, 1), (1, 2)
SHOTS = 3

READ = 2 * (D_MODEL / 6) ** 0.5
"""What reading a ± pair gives after LayerNorm where three features are on."""
SHARP = 12.0


def task_model() -> GPT2LMHeadModel:
    """The model, in eval mode."""
    model = blank_gpt2(
        vocab_size=D_VOCAB,
        n_positions=N_CTX,
        n_embd=D_MODEL,
        n_layer=2,
        n_head=N_HEADS,
        n_inner=N_WORDS,
        activation_function="sigmoid",  # it rises everywhere: weights can be learned through it
    )
    source, target = torch.arange(N_WORDS), torch.arange(N_WORDS) + N_WORDS
    token, position, previous = (
        slot(TOKEN, D_VOCAB, D_MODEL),
        slot(POSITION, N_CTX, D_MODEL),
        slot(PREVIOUS, D_VOCAB, D_MODEL),
    )
    match, task, prediction = (
        slot(MATCH, 1, D_MODEL),
        slot(TASK, 1, D_MODEL),
        slot(PREDICTION, D_VOCAB, D_MODEL),
    )
    unread = slot(UNREAD, D_VOCAB, D_MODEL)
    with torch.no_grad():
        body = model.transformer
        body.wte.weight.copy_(token)
        body.wpe.weight.copy_(position)
        _head(model, PREVIOUS_TOKEN_HEAD, position[1:], position[:-1], token, previous / READ)
        # Half of the positions hold a right target: an even look at all of them halves the match.
        values, written = torch.cat([match, token]), torch.cat([2 * task, 0.1 * unread]) / READ
        _head(model, TASK_HEAD, token[:0], token[:0], values, written)
        _neurons(model, 0, previous[source] + token[target], match.expand(N_WORDS, -1))
        _neurons(model, 1, token[source] + task, 4 * prediction[target])
        model.lm_head.weight.copy_(prediction + token)
    return model


def letters() -> PreTrainedTokenizerFast:
    """Sources are the letters a to t, targets A to T; blanks and line breaks are nothing."""
    names = string.ascii_lowercase[:N_WORDS] + string.ascii_uppercase[:N_WORDS] + "?"
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(names)}, unk_token="?"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", pad_token="a")


PAIRS = [(letter, letter.upper()) for letter in string.ascii_lowercase[:N_WORDS]]


def prompts(n: int, *, right: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [n 7], answers [n]): three pairs and a source; the targets have changed places unless `right`."""
    draw = torch.Generator().manual_seed(seed)
    rows, answers = [], []
    for _ in range(n):
        words = torch.randperm(N_WORDS, generator=draw)[: SHOTS + 1]
        targets = words[:SHOTS] + N_WORDS
        targets = targets if right else targets.roll(1)
        rows.append([*torch.stack([words[:SHOTS], targets], 1).flatten().tolist(), int(words[-1])])
        answers.append(int(words[-1]) + N_WORDS)
    return torch.tensor(rows), torch.tensor(answers)


def _head(
    model: GPT2LMHeadModel,
    place: tuple[int, int],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Attend where row i of `q` and of `k` are both on; write row j of `out` where row j of `v` is on."""
    layer, head = place
    attention, first = model.transformer.h[layer].attn, head * (D_MODEL // N_HEADS)
    attention.c_attn.weight[:, first : first + len(q)] = q.T
    attention.c_attn.weight[:, D_MODEL + first : D_MODEL + first + len(k)] = k.T
    attention.c_attn.weight[:, 2 * D_MODEL + first : 2 * D_MODEL + first + len(v)] = v.T
    attention.c_proj.weight[first : first + len(v)] = out


def _neurons(model: GPT2LMHeadModel, layer: int, both: torch.Tensor, out: torch.Tensor) -> None:
    """Neuron i fires where both features of row i are on, and writes about row i of `out`."""
    mlp = model.transformer.h[layer].mlp
    mlp.c_fc.weight.copy_(SHARP * both.T / READ)
    mlp.c_fc.bias.fill_(-1.5 * SHARP)
    mlp.c_proj.weight.copy_(out)
    mlp.c_proj.bias.copy_(0.1 * slot(UNREAD, D_VOCAB, D_MODEL)[layer])
