"""The window against a naive full softmax: chunks, masks, statistics, memory, and what it restores.

Direct calls of `attend` are in float64, where 1e-12 is a few thousand steps of rounding; whole
models run in float32, where ROUNDING leaves about a hundred steps of the largest value.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from interp.models import attention
from interp.models.attention import Watch, attend, row_chunks, window
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.statistics import Distance, Entropy, Expected, Mass, PeakColumn, Statistic
from tests.families import FAMILIES

ROUNDING = 1e-5
EXACT64 = 1e-12
LENGTH = 40  # chunks hold at least 16 rows: 40 tokens make three
N_HEADS, N_KV, D_HEAD = 4, 2, 8


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def visible(case: str, length: int) -> Tensor:
    """Which key [1 or batch, 1, q, k] a query may see."""
    q, k = torch.arange(length)[:, None], torch.arange(length)[None]
    causal = (k <= q)[None, None]
    if case == "sliding window":
        return causal & (q - k < 5)[None, None]
    if case == "padded left":
        real = torch.stack([torch.arange(length) >= 0, torch.arange(length) >= 7])
        return causal & (real[:, None, None] | torch.eye(length, dtype=torch.bool))
    if case == "padded right":
        real = torch.stack([torch.arange(length) < length, torch.arange(length) < length - 9])
        return causal & (real[:, None, None] | torch.eye(length, dtype=torch.bool))
    return torch.ones_like(causal) if "bidirectional" in case else causal


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    may_see: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(pattern [batch head q k], z [batch q head d_head]) written as in a textbook."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    weights = scores.exp() * may_see
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        sinks = sinks[None, :, None, None] if sinks.ndim == 1 else sinks
        total = total + sinks.exp()
    pattern = weights / total
    return pattern, torch.einsum("bhqk,bhkd->bqhd", pattern, v)


class Rows(Watch):
    """Keeps the pattern, chunk by chunk."""

    needs_rows = True

    def __init__(self) -> None:
        self.chunks: list[tuple[int, Tensor]] = []

    def pattern(self, pattern: Tensor, start: int) -> Tensor:
        self.chunks.append((start, pattern))
        return pattern

    def whole(self, n_keys: int) -> Tensor:
        return torch.cat(
            [nn.functional.pad(rows, (0, n_keys - rows.shape[-1])) for _, rows in self.chunks],
            dim=2,
        )


CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "bidirectional": {},
    "sliding window": {},
    "padded left": {},
    "padded right": {},
    "softcap": {"softcap": 1.5},
    "sinks": {"s_aux": random(N_HEADS, seed=7)},
    "sinks of queries": {"sinks": random(1, N_HEADS, LENGTH, 1, seed=7)},
    "position bias": {"position_bias": random(1, N_HEADS, LENGTH, LENGTH, seed=8)},
    "bidirectional position bias": {
        "position_bias": random(1, N_HEADS, LENGTH, LENGTH, seed=8),
    },
}
MASKS = ("none where it can be", "boolean", "additive")


@torch.no_grad()  # a graph would keep all chunks, so with gradients there is one
@pytest.mark.parametrize("chunk_bytes", [1, 2**30], ids=["chunks", "one chunk"])
@pytest.mark.parametrize("mask_kind", MASKS)
@pytest.mark.parametrize("case", CASES)
def test_attention_equals_the_textbook(
    case: str, mask_kind: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CHUNK_BYTES", chunk_bytes)
    q = random(2, N_HEADS, LENGTH, D_HEAD, seed=1)
    k, v = random(2, N_KV, LENGTH, D_HEAD, seed=2), random(2, N_KV, LENGTH, D_HEAD, seed=3)
    may_see = visible(case, LENGTH)
    mask: Tensor | None = may_see
    if mask_kind == "additive":
        mask = torch.zeros(may_see.shape, dtype=torch.float64)
        mask.masked_fill_(~may_see, torch.finfo(torch.float64).min)
    elif mask_kind != "boolean" and not case.startswith(("sliding", "padded")):
        mask = None
    module, watch, options = nn.Module(), Rows(), CASES[case]
    with window(module, lambda m: watch):
        z, _ = attend(
            module,
            q,
            k,
            v,
            mask,
            scaling=0.4,
            is_causal=not case.startswith("bidirectional"),
            **options,
        )
    pattern, wanted = naive(
        q,
        k,
        v,
        may_see,
        0.4,
        softcap=options.get("softcap"),
        sinks=options.get("s_aux", options.get("sinks")),
        bias=options.get("position_bias"),
    )
    starts = [start for start, _ in watch.chunks]
    assert starts == ([0, 16, 32] if chunk_bytes == 1 else [0])
    assert (watch.whole(LENGTH) - pattern).abs().max() < EXACT64
    assert (z - wanted).abs().max() < EXACT64


@pytest.mark.parametrize("mask_kind", ["none", "boolean", "additive"])
def test_keys_an_indexer_did_not_pick_are_hidden(mask_kind: str) -> None:
    q = random(2, N_HEADS, LENGTH, D_HEAD, seed=1)
    k, v = random(2, N_KV, LENGTH, D_HEAD, seed=2), random(2, N_KV, LENGTH, D_HEAD, seed=3)
    indices = random(2, LENGTH, LENGTH, seed=9).topk(5).indices
    may_see = torch.zeros(2, 1, LENGTH, LENGTH, dtype=torch.bool)
    may_see[:, 0].scatter_(-1, indices, True)
    mask: Tensor | None = None
    if mask_kind != "none":
        mask = torch.arange(LENGTH)[:, None] != torch.arange(LENGTH)[None]  # no query sees itself
        mask = mask[None, None]
        may_see = may_see & mask
        if mask_kind == "additive":
            low = torch.finfo(torch.float64).min
            mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, low)
    pattern, wanted = naive(q, k, v, may_see, 0.4)
    module, watch = nn.Module(), Rows()
    with window(module, lambda m: watch):
        z, _ = attend(module, q, k, v, mask, scaling=0.4, is_causal=False, indices=indices)
    assert (watch.whole(LENGTH) - pattern).abs().max() < EXACT64
    assert (z - wanted).abs().max() < EXACT64


@pytest.mark.parametrize("case", ["causal", "bidirectional", "sliding window", "position bias"])
def test_sdpa_and_rows_agree(case: str) -> None:
    """What nobody watches goes through SDPA: the same z."""
    q = random(2, N_HEADS, LENGTH, D_HEAD, seed=1)
    k, v = random(2, N_HEADS, LENGTH, D_HEAD, seed=2), random(2, N_HEADS, LENGTH, D_HEAD, seed=3)
    mask = visible(case, LENGTH) if case == "sliding window" else None
    options = {"scaling": 0.4, "is_causal": case != "bidirectional", **CASES[case]}
    z = {}
    for watch in (Watch(), Rows()):
        module = nn.Module()
        with window(module, lambda m, watch=watch: watch):
            z[watch.needs_rows], _ = attend(module, q, k, v, mask, **options)
    assert (z[True] - z[False]).abs().max() < EXACT64


def test_chunks_cover_every_row_once() -> None:
    for n_maps, n_queries, n_keys in ((1, 1, 1), (8, 100, 100), (4096, 37, 2000), (2, 5000, 5000)):
        chunks = row_chunks(n_maps, n_queries, n_keys)
        rows = [row for start, stop in chunks for row in range(start, stop)]
        assert rows == list(range(n_queries))


# --- whole models --------------------------------------------------------------------------------

CHUNKED = ["llama", "mistral", "gemma2", "gpt_oss", "modernbert", "bert", "t5_encoder"]
"""Causal, sliding window, softcap, sinks, bidirectional with and without a window, position bias."""


def long_batch(padded: str | None) -> Batch:
    ids = torch.randint(10, 97, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded == "left":
        mask[1, :7] = False
    elif padded == "right":
        mask[1, -9:] = False
    return Batch.of_ids(ids, mask)


def some_statistics(batch: Batch, causal: bool) -> dict[str, Statistic]:
    """Masses with one key, several keys, no key for some queries; entropy with and without row 0."""
    assert batch.mask is not None
    here = torch.arange(LENGTH).expand(2, -1)
    later = batch.mask & (here > 12)
    generator = torch.Generator().manual_seed(6)
    several = torch.randint(0, LENGTH, (2, LENGTH, 3), generator=generator)
    n_visible = (
        batch.mask.cumsum(-1) if causal else batch.mask.sum(-1, keepdim=True).expand(-1, LENGTH)
    )
    return {
        "first": Mass(torch.zeros(2, LENGTH, 1, dtype=torch.long), batch.mask),
        "previous": Mass((here - 1)[..., None], later),  # -1 at the first query: none
        "several": Mass(several, batch.mask),
        "twice": Mass(torch.stack([here - 1, here - 1], dim=-1), later),
        "entropy": Entropy(later, n_visible),
        "entropy of all": Entropy(batch.mask, n_visible),
        "where": Expected(here.float(), later),
        "how far": Distance(several[..., 0] % 2 == 0, later),
        "some keys": Expected((several[..., 0] % 3 == 0).float(), batch.mask),
        "peak": PeakColumn(batch.mask & (here > 2) & (here < LENGTH - 5), batch.mask),
        "peak of few rows": PeakColumn(here < LENGTH // 2, later),
    }


def by_hand(statistic: Statistic, pattern: Tensor) -> Tensor:
    """The statistic [batch head] summed in loops over a whole pattern [batch head q k]."""
    if isinstance(statistic, PeakColumn):
        best = torch.full(pattern.shape[:2], -torch.inf, dtype=torch.float64)
        for b, key in statistic.keys.nonzero().tolist():
            rows = [row for row in statistic.rows[b].nonzero()[:, 0].tolist() if row > key]
            if rows:
                best[b] = best[b].maximum(pattern[b, :, rows, key].double().mean(-1))
        return best
    out = torch.zeros(pattern.shape[:2], dtype=torch.float64)
    for b in range(len(pattern)):
        rows = statistic.rows[b].nonzero()[:, 0].tolist()
        for row in rows:
            weights = pattern[b, :, row].double()
            if isinstance(statistic, Mass):
                keys = [key for key in statistic.keys[b, row].tolist() if key >= 0]
                out[b] += weights[:, keys].sum(-1) / len(rows)
            elif isinstance(statistic, Distance):
                far = (torch.arange(pattern.shape[-1]) - row).abs() * statistic.keys[b]
                out[b] += weights @ far.double() / len(rows)
            elif isinstance(statistic, Expected):
                out[b] += weights @ statistic.values[b].double() / len(rows)
            else:
                nats = -(weights * weights.clamp_min(1e-300).log()).sum(-1)
                out[b] += nats / math.log(max(int(statistic.visible[b, row]), 2)) / len(rows)
    return out


@pytest.mark.parametrize("padded", [None, "left", "right"])
@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_change_nothing(
    name: str, padded: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """z, pattern, logits and statistics: three chunks against one, and against loops by hand."""
    model, batch = Model(FAMILIES[name](), id=name), long_batch(padded)
    wanted = some_statistics(batch, model.spec.causal)
    whole = model.run(batch, capture=["z", "pattern", "scores"], statistics=wanted)
    monkeypatch.setattr(attention, "CHUNK_BYTES", 1)
    chunked = model.run(batch, capture=["z", "pattern", "scores"], statistics=wanted)
    assert batch.mask is not None
    for site in ("z", "pattern"):
        assert (chunked.cache[site] - whole.cache[site]).abs().max() < ROUNDING
    allowed = whole.cache["pattern"] > 0
    assert torch.equal(allowed, chunked.cache["pattern"] > 0)
    scores, reference = (run.cache["scores"].where(allowed, 0) for run in (chunked, whole))
    assert (scores - reference).abs().max() < ROUNDING * reference.abs().max()
    real = batch.mask[..., None] if whole.logits.ndim == 3 else torch.ones(1, dtype=torch.bool)
    assert (
        (chunked.logits - whole.logits) * real
    ).abs().max() < ROUNDING * whole.logits.abs().max()
    for key, statistic in wanted.items():
        assert chunked.statistics[key].shape == (2, model.n_layers, model.spec.n_heads)
        for layer in range(model.n_layers):
            by_loops = by_hand(statistic, whole.cache[f"pattern.{layer}"])
            for run in (whole, chunked):
                error = (run.statistics[key][:, layer] - by_loops).abs().max()
                assert error < ROUNDING * max(1.0, float(by_loops.abs().max())), key


def test_patterns_are_distributions_unless_there_is_a_sink() -> None:
    for name in CHUNKED:
        model = Model(FAMILIES[name](), id=name)
        sums = model.run(long_batch(None), capture=["pattern"]).cache["pattern"].sum(-1)
        if "sinks" in FAMILIES[name].traits:
            assert sums.mean() < 0.95 and (sums < 1 + ROUNDING).all()
        else:
            assert (sums - 1).abs().max() < ROUNDING


def test_a_sliding_window_hides_what_is_too_far() -> None:
    model = Model(FAMILIES["mistral"](), id="mistral")
    pattern = model.run(long_batch(None), capture=["pattern"]).cache["pattern"]
    q, k = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
    inside = (k <= q) & (q - k < 4)
    assert not pattern[..., ~inside].any()
    assert (pattern[..., inside] > 0).float().mean() > 0.99


# --- the mask trap -------------------------------------------------------------------------------


@pytest.mark.parametrize("capture", [(), ("z",), ("pattern",)], ids=str)
def test_a_causal_model_stays_causal(tiny: Model, capture: tuple[str, ...]) -> None:
    """A later token changes no earlier logit, and no weight lies above the diagonal.

    (Without its mask entry the function gets no mask at all, and no error says so: padding and
    sliding windows would be seen through. Those are the tests that fail then.)
    """
    ids = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, 8] = (ids[:, 8] + 1) % 97
    run, changed = (tiny.run(x, capture=capture) for x in (ids, other))
    assert torch.equal(run.logits[:, :8], changed.logits[:, :8])
    assert (run.logits[:, 8:] - changed.logits[:, 8:]).abs().max() > 0.01
    if "pattern" in capture:
        for each in (run, changed):
            assert not each.cache["pattern"].triu(1).any()


# --- memory --------------------------------------------------------------------------------------


class Memory(TorchDispatchMode):
    """Bytes of all tensors made inside and alive at once, and of the largest: no timing, no RSS."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {
            x.untyped_storage().data_ptr()
            for x in tree_leaves((args, kwargs or {}))
            if isinstance(x, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if not isinstance(x, Tensor):
                continue
            storage = x.untyped_storage()
            key = storage._cdata
            if storage.data_ptr() in inputs or key in self.alive:
                continue
            self.alive[key] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, key, None)
            self.largest = max(self.largest, storage.nbytes())
            self.peak = max(self.peak, sum(self.alive.values()))
        return out


def test_statistics_of_a_long_prompt_never_hold_a_pattern(
    tiny_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peak memory of statistics grows with tokens; of a captured pattern with tokens²."""
    length = 2048
    model = tiny_model(max_position_embeddings=length)
    ids = torch.randint(97, (1, length), generator=torch.Generator().manual_seed(0))
    rows = torch.ones(1, length, dtype=torch.bool)
    here = torch.arange(length)[None]
    wanted = {
        "first": Mass(torch.zeros(1, length, 1, dtype=torch.long), rows),
        "previous": Mass((here - 1)[..., None], rows),
        "entropy": Entropy(rows, here + 1),
    }
    one_pattern = 4 * length * length * 4  # heads · q · k · bytes, of one layer

    with Memory() as default:
        model.run(ids, statistics=wanted, logits=False)
    assert default.largest <= attention.CHUNK_BYTES

    monkeypatch.setattr(attention, "CHUNK_BYTES", 2**20)
    with Memory() as streamed:
        model.run(ids, statistics=wanted, logits=False)
    assert streamed.peak < one_pattern / 4
    with Memory() as half:
        model.run(ids[:, : length // 2], statistics={"first": _first(length // 2)}, logits=False)
    with Memory() as full:
        model.run(ids, statistics={"first": _first(length)}, logits=False)
    assert full.peak < 2.5 * half.peak

    with Memory() as captured:
        model.run(ids, capture=["pattern"], logits=False)
    assert captured.peak > 2 * one_pattern  # the measure can tell


def _first(length: int) -> Mass:
    rows = torch.ones(1, length, dtype=torch.bool)
    return Mass(torch.zeros(1, length, 1, dtype=torch.long), rows)


# --- opening and closing ------------------------------------------------------------------------


class Count(Watch):
    """Counts the calls it saw."""

    def __init__(self) -> None:
        self.calls = 0

    def z(self, z: Tensor) -> Tensor:
        self.calls += 1
        return z


def test_nested_windows_restore(tiny: Model) -> None:
    ids = torch.tensor([[5, 6, 7]])
    outer, inner = Count(), Count()
    before = tiny.module.config._attn_implementation
    assert before != attention.IMPLEMENTATION
    with window(tiny.module, lambda m: outer):
        tiny.module(ids)
        with window(tiny.module, lambda m: inner):
            tiny.module(ids)
        assert tiny.module.config._attn_implementation == attention.IMPLEMENTATION
        tiny.module(ids)
        tiny.run(ids, capture=["pattern"])  # a run opens a window of its own
        tiny.module(ids)
    assert (outer.calls, inner.calls) == (3 * tiny.n_layers, tiny.n_layers)
    tiny.module(ids)
    assert (outer.calls, inner.calls) == (3 * tiny.n_layers, tiny.n_layers)
    assert tiny.module.config._attn_implementation == before
    assert not attention._listeners


def test_a_window_closes_when_an_exception_flies(tiny: Model) -> None:
    before = tiny.module.config._attn_implementation

    def fail() -> None:
        with window(tiny.module, lambda m: Watch()), window(tiny.module, lambda m: Watch()):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert tiny.module.config._attn_implementation == before
    assert not attention._listeners


def test_two_models_have_windows_of_their_own(tiny_model: Callable[..., Model]) -> None:
    """Two copies share their config in Hugging Face; a window on one does not watch the other."""
    one, two = tiny_model(seed=0), tiny_model(seed=1)
    ids = torch.tensor([[5, 6, 7]])
    seen = Count()
    plain = two.run(ids).logits
    with window(one.module, lambda m: seen):
        assert torch.equal(two.run(ids).logits, plain)
        assert torch.equal(two.module(ids).logits, plain)
    assert seen.calls == 0


def test_importing_the_window_changes_no_other_implementation() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    assert AttentionInterface()[attention.IMPLEMENTATION] is attend
    assert attention.IMPLEMENTATION in AttentionMaskInterface().keys()  # noqa: SIM118 - not a dict
    assert AttentionInterface()["sdpa"] is not attend
