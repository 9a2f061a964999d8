"""For every detector of heads a model on which some heads must answer, and a random one on which none may.

Tests of the registry read `TRUTHS`: a detector that is not in it fails them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from transformers import BertConfig, BertModel, DeiTConfig, DeiTModel, LlamaConfig, LlamaForCausalLM

import circuits
import interp
from circuits.heads.needle import NeedleRun
from interp.models.model import Model
from interp.report import Report
from tests.ground_truth import encoder_model, vision_model
from tests.ground_truth.copying_model import (
    COPY,
    MATCH,
    SUPPRESS,
    copying_model,
    looking_at_their_own_token,
)
from tests.ground_truth.dormant_model import EVEN, SINK, SWITCHING, dormant_model
from tests.ground_truth.head_zoo import ZOO, head_zoo
from tests.ground_truth.induction_model import (
    INDUCTION_HEAD,
    PREVIOUS_TOKEN_HEAD,
    character_tokenizer,
    induction_model,
)

Head = tuple[int, int]
Range = tuple[float, float]
ANY = float("inf")


@dataclass(frozen=True)
class Truth:
    """What a detector must say.

    Attributes:
        world: in WORLDS, a model with planted heads; `null` is in NULLS, a random one of the same kind.
        heads: the planted heads; their score lies in `says`.
        others: where the score of all other heads lies, but for those `apart`.
        chance: where score less null lies for every head of the random model. For the planted heads it
            lies outside.
        even: the null of a detector that has none: the score of even attention.
        with_it: labels that the planted heads get beside this detector's, from others of the world.
    """

    world: str
    heads: tuple[Head, ...]
    says: Range
    others: Range
    chance: Range = (-0.15, 0.15)
    apart: tuple[Head, ...] = ()
    with_it: frozenset[str] = frozenset()
    null: str = "text"
    even: float | None = None


# --- models ------------------------------------------------------------------------------------


def _text(module: torch.nn.Module) -> Model:
    return interp.load(module, tokenizer=character_tokenizer())


def _unsure() -> Model:
    """The induction model with logits that leave it in doubt: where its loss is 0, so is every gradient."""
    module = induction_model()
    with torch.no_grad():
        module.lm_head.weight.mul_(0.15)
    return _text(module)


def _random(module: torch.nn.Module) -> torch.nn.Module:
    """Wide enough that patterns are far from even."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in module.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name.lower() else 0.3 * noise)
    return module.eval()


SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA = {"vocab_size": 97, "max_position_embeddings": 64, "tie_word_embeddings": False}
BERT = {"vocab_size": encoder_model.D_VOCAB, "max_position_embeddings": 64, "pad_token_id": 0}

WORLDS: dict[str, Callable[[], Model]] = {
    "roles": lambda: _text(head_zoo()),
    "induction": lambda: _text(induction_model()),
    "unsure": _unsure,
    "needles": lambda: _text(induction_model()),
    "copying": lambda: _text(copying_model()),
    "own token": lambda: _text(looking_at_their_own_token()),
    "dormant": lambda: _text(dormant_model()),
    "encoder": lambda: interp.load(
        encoder_model.encoder_zoo(), tokenizer=encoder_model.bert_tokenizer()
    ),
    "images": lambda: interp.load(vision_model.vision_zoo()),
}
NULLS: dict[str, Callable[[], Model]] = {
    "text": lambda: _text(_random(LlamaForCausalLM(LlamaConfig(**SHAPE, **LLAMA)))),
    "encoder": lambda: interp.load(
        _random(BertModel(BertConfig(**SHAPE, **BERT))), tokenizer=encoder_model.bert_tokenizer()
    ),
    "images": lambda: interp.load(
        _random(DeiTModel(DeiTConfig(**SHAPE, image_size=48, patch_size=8)))
    ),
}


# --- what each detector must say ----------------------------------------------------------------


MASS, NOTHING = (0.95, 1.001), (-1e-3, 1e-3)


def _in_zoo(zoo: Mapping[str, object], *names: str) -> tuple[Head, ...]:
    return tuple((0, list(zoo).index(name)) for name in names)


def _role(
    name: str, low: float = 0.95, others: float = ANY, chance: Range = (-0.15, 0.15)
) -> Truth:
    """A head of the zoo of text models, with a role of its own."""
    return Truth("roles", _in_zoo(ZOO, name), (low, 1.001), (-ANY, others), chance)


def _both_ways(world: str, name: str, others: float = 0.5, chance: Range = (-0.15, 0.15)) -> Truth:
    """The heads of the zoo of encoders or of image models that have this role, one of them perhaps with another."""
    zoo = encoder_model.ENCODER_ZOO if world == "encoder" else vision_model.VISION_ZOO
    roles = {(0, head): given.split(",") for head, given in enumerate(zoo)}
    heads = tuple(head for head, given in roles.items() if name in given)
    with_it = frozenset(other for head in heads for other in roles[head]) - {name}
    return Truth(world, heads, MASS, (-ANY, others), chance, with_it=with_it, null=world)


N_CTX = 64
EVEN_DISTANCE = sum(q * (q - 1) / 2 / (q + 1) for q in range(32, N_CTX)) / sum(
    q / (q + 1) for q in range(32, N_CTX)
)
"""Mean distance of even attention over the second half of 64 tokens, the first of them left out."""
BY_PLACE = _in_zoo(ZOO, "previous_token", "fixed_offset", "current_token", "recency")
BY_KEY = _in_zoo(ZOO, "broad", "delimiter", "rare_token", "later_sink")
SHARP = _in_zoo(ZOO, "previous_token", "fixed_offset", "current_token", "first_token_sink")
TRUTHS: dict[str, Truth] = {
    **{
        name: _role(name, others=0.2)
        for name in ("previous_token", "fixed_offset", "current_token", "first_token_sink")
    },
    "duplicate_token": _role("duplicate_token", others=0.1),
    "recency": _role(
        "recency", chance=(-0.1, 0.5)
    ),  # heads with one offset score as high and get their own labels
    "broad": _role("broad", 0.8, chance=(-0.7, -0.3)),
    "delimiter": _role("delimiter", 0.6, others=0.3),  # rows before the first have nothing to see
    "rare_token": _role("rare_token", 0.6, others=0.3),
    "later_sink": _role(
        "later_sink"
    ),  # a mark, once seen, is a sink too, and explained by its kind
    "distance": Truth(
        "roles",
        _in_zoo(ZOO, "previous_token", "current_token"),
        (-0.05, 1.05),
        (2.9, 45),
        (-4, 4),
        apart=_in_zoo(ZOO, "first_token_sink"),  # nothing on other tokens
        even=EVEN_DISTANCE,
    ),
    "effective_context": Truth("roles", BY_PLACE, (0.9, 10.1), (25, 45), (-15, 1)),
    "entropy": Truth("roles", SHARP, (-1e-3, 0.05), (0.1, 3.3), (0.5, 3.3)),
    "positional_share": Truth("roles", BY_PLACE, MASS, (-0.1, 0.1)),
    "key_share": Truth("roles", BY_KEY, MASS, (-0.1, 0.1), (-0.1, 0.3)),
    "induction": Truth(
        "induction", (INDUCTION_HEAD,), MASS, (-ANY, 0.1), with_it=frozenset({"episodic"})
    ),
    "induction_copying": Truth("induction", (INDUCTION_HEAD,), (1, ANY), NOTHING),
    "episodic": Truth(
        "induction", (INDUCTION_HEAD,), MASS, (-ANY, 0.1), with_it=frozenset({"induction"})
    ),
    "exact_ablation": Truth(
        "induction", (PREVIOUS_TOKEN_HEAD, INDUCTION_HEAD), (3, ANY), NOTHING, (-0.5, 0.5)
    ),
    "gradient_importance": Truth(
        "unsure", (PREVIOUS_TOKEN_HEAD, INDUCTION_HEAD), (0.9, ANY), NOTHING, (-0.5, 0.5)
    ),
    # to first order the previous-token head, whose reader is as sure as can be, has the wrong sign
    "first_order_ablation": Truth(
        "unsure", (INDUCTION_HEAD,), (1, ANY), NOTHING, (-0.6, 0.6), apart=(PREVIOUS_TOKEN_HEAD,)
    ),
    "retrieval": Truth(
        "needles", (INDUCTION_HEAD,), MASS, (-ANY, 0.05), with_it=frozenset({"induction"})
    ),
    "evaluator": Truth("needles", (INDUCTION_HEAD,), (0.9, 1), (-ANY, 0.5), (-0.3, 0.3)),
    "copying": Truth("copying", (COPY,), (3, ANY), (-1, 1), (-1, 1), apart=(SUPPRESS,)),
    "suppression": Truth("copying", (SUPPRESS,), (3, ANY), (-1, 1), (-1, 1), apart=(COPY,)),
    "copying_rank": Truth("copying", (COPY,), (1, 1.5), (4, 90), (-25, 25), apart=(SUPPRESS,)),
    "copying_eigenvalues": Truth(
        "copying", (COPY,), MASS, (-0.3, 0.3), (-0.4, 0.4), apart=(SUPPRESS,)
    ),
    "qk_matching": Truth("copying", (MATCH,), (3, ANY), (-1, 1), (-1, 1)),
    "copying_on_text": Truth("own token", (COPY,), (3, ANY), (-1, 1), (-1, 1), apart=(SUPPRESS,)),
    "copying_on_repeats": Truth(
        "own token", (COPY,), (3, ANY), (-1, 1), (-1, 1), apart=(SUPPRESS,)
    ),
    "value_drain": Truth("dormant", ((0, SINK), (0, EVEN)), (0, 1e-3), (0.5, 2), (-0.5, 1.5)),
    "no_op": Truth("dormant", ((0, SINK),), MASS, (-ANY, 0.2)),
    "switching": Truth("dormant", ((0, SWITCHING),), (0.5, 1), (-0.1, 0.1), (-0.1, 0.15)),
    **{name: _both_ways("encoder", name) for name in ("next_token", "separator", "cls")},
    # where all heads rest on nothing, CLS reads as much; the null is what the other rows read
    "cls_reads": _both_ways("encoder", "cls_reads", ANY, (-0.3, 0.3)),
    "patch_offset": _both_ways("images", "patch_offset"),
    "register": _both_ways("images", "register", chance=(-0.15, 0.45)),  # one key, not all patches
    "patch_sink": _both_ways("images", "patch_sink", chance=(-0.1, 0.4)),
    "patch_window": _both_ways("images", "patch_window", ANY, (-0.1, 0.4)),
    "patch_distance": Truth(
        "images",
        _in_zoo(vision_model.VISION_ZOO, "current_token"),
        (-0.01, 0.01),
        (0.5, ANY),
        (-0.5, 0.5),
        apart=_in_zoo(
            vision_model.VISION_ZOO, "cls", "register", "cls_reads,register"
        ),  # nothing on patches
        null="images",
    ),
}

NEIGHBOURS = {
    "induction": (
        "duplicate_token",
        "current_token",
        "fixed_offset",
        "recency",
        "first_token_sink",
    ),
    "needles": ("induction", "duplicate_token", "current_token", "first_token_sink"),
    "encoder": ("previous_token", "current_token", "fixed_offset", "delimiter", "broad"),
    "images": ("current_token", "cls", "cls_reads", "broad"),
}
"""Detectors of labels that are asked too, of heads that are not theirs."""


# --- needles that a model of 64 positions can answer ---------------------------------------------


def asked(n: int, seed: int, width: int, cue: int) -> list[NeedleRun]:
    """<bos>, haystack, a needle of distinct letters, haystack, the needle's first letters."""
    found = []
    for i in range(n):
        generator = torch.Generator().manual_seed(100 * seed + i)
        hay = 28 + torch.randint(20, (28,), generator=generator)  # capitals
        needle = 2 + torch.randperm(26, generator=generator)[:width]
        at = int(torch.randint(width, 20, (1,), generator=generator)) if width < 20 else 20
        ids = torch.cat([torch.tensor([0]), hay[:at], needle, hay[at:], needle[:cue]])
        found.append(NeedleRun(ids, 1 + at + cue, width - cue, control=1, depth=at / 28))
    return found


@contextmanager
def short_needles(always: bool) -> Iterator[None]:
    """Retrieval goes on from two letters of ten; evaluators have sixteen rows that all ask. `always`: every
    answer counts, right or wrong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "circuits.heads.retrieval.needle_runs", lambda model, n, *, seed: asked(n, seed, 10, 2)
        )
        patch.setattr("circuits.heads.evaluator.needle_runs", _all_rows_ask)
        if always:
            patch.setattr("circuits.heads.needle_decoding.RECALLED", -1.0)
        yield


def _all_rows_ask(model: Model, n: int, *, seed: int) -> list[NeedleRun]:
    """The whole needle counts: the sixteen letters of the cue are answered one by one."""
    runs = asked(n, seed, 17, 16)
    return [NeedleRun(run.ids, run.start - 15, 16, control=1) for run in runs]


# --- reports ------------------------------------------------------------------------------------


@cache
def planted_report(world: str) -> Report:
    """All detectors of a world, and their neighbours."""
    names = [name for name, truth in TRUTHS.items() if truth.world == world]
    return _report(WORLDS[world](), [*names, *NEIGHBOURS.get(world, ())], always=False)


@cache
def null_report(null: str) -> Report:
    """The same detectors on a random model of the kind."""
    names = [name for name, truth in TRUTHS.items() if truth.null == null]
    return _report(NULLS[null](), names, always=True)


def _report(model: Model, names: Sequence[str], always: bool) -> Report:
    with short_needles(always):
        return circuits.classify_heads(
            model, detectors=names, prompts=6, ablate=False, evidence=0, progress=False
        )
