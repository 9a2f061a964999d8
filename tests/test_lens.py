"""The lens against the model's own logits, plain Hugging Face and known answers.

Tolerances: float32 throughout. Three tiny blocks or one unembedding leave errors of a few 1e-6 of the
largest value; products of another shape may add in another order. KL is a difference of numbers as
large as the logits, so it is good to about 1e-4 nats where logits reach 30.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from interp.affine_lens import AffineLens, cached_lens, lens_path
from interp.data.english import Document, documents, recipe
from interp.errors import BadInput, Refused
from interp.figures.lens_map import QUANTITIES, lens_map
from interp.lens import logit_lens, read
from interp.lens_text import _held_out_by_document, _windows
from interp.metrics import kl
from interp.models.calls import uncapped_logits
from interp.models.model import Model
from interp.quiet_direction import quiet_direction
from interp.report import Report
from interp.ridge_lens import Moments, fit_ridge_lens, held_out_kl
from interp.run.batch import Batch
from interp.unembedding import Unembedding
from tests.families import FAMILIES

HEADLESS = [
    name
    for name, family in FAMILIES.items()
    if family.traits[0] == "vision" or "no head" in family.traits or "unembedding" in family.refused
]
READABLE = [name for name in FAMILIES if name not in HEADLESS]
STORE = "When Mary and John went to the store, John gave a drink to"


@cache
def model_of(name: str) -> Model:
    return Model(FAMILIES[name](), id=name)


def some_ids(rows: int = 2, length: int = 7, seed: int = 3) -> Tensor:
    return torch.randint(10, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def stacked(model: Model, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(resid_post of all layers and positions of one prompt [n_layers pos d_model], logits)."""
    run = model.run(ids, capture=["resid_post"])
    assert run.logits is not None
    return run.cache["resid_post"][0].transpose(0, 1), run.logits[0]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lenses that a test keeps go nowhere else; the default model still comes from the real cache."""
    monkeypatch.setattr("interp.affine_lens.cache_folder", lambda: tmp_path)


# --- identities over families -----------------------------------------------------------------


@pytest.mark.parametrize("name", READABLE)
def test_last_layer_is_the_model(name: str) -> None:
    model, ids = model_of(name), some_ids()
    logits = model.run(ids).logits
    assert logits is not None
    final = model.run(ids, capture=[f"resid_post.{model.n_layers - 1}"]).cache["resid_post"][
        :, :, 0
    ]
    got = Unembedding(model)(final)
    assert float((got - logits).abs().max() / logits.abs().max()) < 1e-5

    layers = [model.n_layers - 1] if len(model.spec.stages) > 1 else range(model.n_layers)
    sites = [f"resid_post.{layer}" for layer in layers]
    table = logit_lens(model, ids, sites=sites, lens="logit").table
    last = table[table["layer"] == model.n_layers - 1]
    best = logits.softmax(-1).max(-1)
    assert last["target_id"].tolist() == best.indices.flatten().tolist()
    assert np.allclose(last["top_probability"], best.values.flatten(), rtol=1e-4)
    assert (last["kl"] == 0).all() and (last["target_rank"] == 0).all()
    assert (table["kl"] >= 0).all()
    assert table["entropy"].between(0, math.log(97) + 1e-5).all()
    assert len(table) == len(layers) * ids.numel()


def test_layers_of_earlier_stages_are_refused() -> None:
    model = model_of("funnel")
    with pytest.raises(Refused, match=r"earlier stages.*as 'resid_post.3'"):
        logit_lens(model, some_ids(), lens="logit")


@pytest.mark.parametrize("name", HEADLESS)
def test_a_model_without_unembedding_is_refused(name: str) -> None:
    with pytest.raises(Refused, match=r"unembedd|head"):
        logit_lens(model_of(name), some_ids())


def test_numbers_are_what_they_say(tiny: Model) -> None:
    layers, logits = stacked(tiny, some_ids(1))
    targets = torch.arange(7) * 5
    reading = read(tiny, layers, final=layers[-1], targets=targets, top_k=4)
    own = tiny.unembed(layers).double()
    p = own.softmax(-1)
    order = own.argsort(-1, descending=True)
    assert torch.equal(reading.top_ids, order[..., :4])
    assert torch.allclose(
        reading.top_probabilities.double(), p.gather(-1, order[..., :4]), rtol=1e-4
    )
    assert torch.allclose(reading.entropy.double(), -(p * p.log()).sum(-1), atol=1e-4)
    assert reading.kl is not None and reading.target_ranks is not None
    assert torch.allclose(reading.kl, kl(logits[None], own), atol=1e-4)
    assert torch.equal(reading.target_ranks, (order == targets[:, None]).long().argmax(-1))
    assert reading.target_probabilities is not None
    expected = p.gather(-1, targets.expand(2, -1)[..., None])[..., 0]
    assert torch.allclose(reading.target_probabilities.double(), expected, rtol=1e-4)


def test_several_targets_a_row_are_read_as_each_alone(tiny: Model) -> None:
    layers, _ = stacked(tiny, some_ids(1))
    targets = torch.stack([torch.arange(7) * 5, torch.arange(7) + 3], dim=1)
    both = read(tiny, layers, targets=targets)
    for place, one in enumerate(targets.unbind(1)):
        alone = read(tiny, layers, targets=one)
        for number in ("target_ids", "target_ranks", "target_probabilities"):
            assert torch.equal(getattr(both, number)[..., place], getattr(alone, number))


def test_kl_runs_from_the_final_distribution_to_the_lens(tiny: Model) -> None:
    layers, _ = stacked(tiny, some_ids(1))
    reading = read(tiny, layers, final=layers[-1])
    first, last = tiny.unembed(layers[0]), tiny.unembed(layers[-1])
    assert reading.kl is not None
    assert torch.allclose(reading.kl[0], kl(last, first), atol=1e-4)
    assert not torch.allclose(reading.kl[0], kl(first, last), atol=1e-2)


def test_chunks_change_nothing(tiny: Model) -> None:
    layers, _ = stacked(tiny, some_ids(1))
    whole = read(tiny, layers, final=layers[-1])
    for rows in (1, 3):
        parts = read(tiny, layers, final=layers[-1], chunk_bytes=rows * 4 * 97)
        assert torch.equal(whole.top_ids, parts.top_ids)
        assert whole.kl is not None and parts.kl is not None
        assert torch.allclose(whole.kl, parts.kl, atol=1e-4)
        assert torch.allclose(whole.entropy, parts.entropy, atol=1e-5)
        assert (parts.kl[-1] == 0).all()


def test_the_norm_is_applied_once(tiny: Model) -> None:
    """`hidden_states[-1]` of Hugging Face is normed already; reading it would norm it again."""
    ids = some_ids(1)
    layers, logits = stacked(tiny, ids)
    with torch.no_grad():
        normed = tiny.module(ids, output_hidden_states=True).hidden_states[-1][0]
    assert torch.allclose(tiny.unembed(layers[-1]), logits, atol=1e-4)
    twice = read(tiny, normed, final=layers[-1]).kl
    assert twice is not None and float(twice.min()) > 0.005  # rounding: 1e-4


def test_the_norm_is_applied_once_in_the_default_model(smollm: Model) -> None:
    batch = smollm.as_batch(STORE)
    layers, _ = stacked(smollm, batch.ids)
    with torch.no_grad():
        normed = smollm.module(batch.ids, output_hidden_states=True).hidden_states[-1][0]
    twice = read(smollm, normed[1:], final=layers[-1][1:]).kl
    assert twice is not None and float(twice.mean()) > 2  # 13 nats on longer text


def test_sixteen_bit_weights_are_unembedded_in_float32() -> None:
    module = FAMILIES["gemma2"]().to(torch.bfloat16)
    model = Model(module, id="gemma2 in bfloat16")
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    got = Unembedding(model)(x)
    assert got.dtype == torch.float32
    normed = module.model.norm(x).float()
    cap = module.config.final_logit_softcapping
    expected = torch.tanh(normed @ module.lm_head.weight.float().T / cap) * cap
    assert torch.allclose(got, expected, atol=1e-5)
    assert not torch.equal(got, model.unembed(x).float())


# --- the report ------------------------------------------------------------------------------


def test_padding_on_either_side_and_single_prompts_agree(tiny: Model) -> None:
    rows = [[11, 12, 13, 14], [21, 22]]
    alone = [logit_lens(tiny, torch.tensor([row]), lens="logit").table for row in rows]
    for left in (False, True):
        pad = [[0] * (4 - len(row)) for row in rows]
        ids = torch.tensor([p + r if left else r + p for p, r in zip(pad, rows, strict=True)])
        table = logit_lens(tiny, Batch.of_ids(ids, ids > 0), lens="logit").table
        for i, single in enumerate(alone):
            mine = table[table["prompt"] == i].reset_index(drop=True)
            assert mine[["layer", "position", "token", "top_token"]].equals(
                single[["layer", "position", "token", "top_token"]]
            )
            assert np.allclose(mine["kl"], single["kl"], atol=1e-4)


def test_sites_heads_and_positions(tiny: Model) -> None:
    ids = some_ids(1)
    report = logit_lens(
        tiny,
        ids,
        sites=["embed", "resid_mid", "mlp_write.1", "z.1"],
        positions=[-1, 2],
        lens="best",
    )
    counted = report.table.groupby("site").size().to_dict()
    assert counted == {"embed": 2, "resid_mid": 4, "mlp_write": 2, "z": 8}
    assert set(report.table["position"]) == {2, 6} and len(report.tables["top"]) == 16 * 5
    heads = report.table[report.table["site"] == "z"]
    cache = tiny.run(ids, capture=["z", "attn_write"]).cache
    written = torch.einsum("phd,hdm->hpm", cache["z.1"][0, [2, 6]], tiny.W_O(1))
    assert torch.allclose(written.sum(0), cache["attn_write.1"][0, [2, 6]], atol=1e-4)
    assert heads["top_token"].tolist() == tiny.tokens(tiny.unembed(written).argmax(-1).flatten())


def test_what_is_followed(tiny: Model) -> None:
    ids = some_ids(1)
    final = tiny.run(ids).logits[0].argmax(-1).tolist()  # type: ignore[index]
    last = {
        follow: logit_lens(tiny, ids, lens="logit", follow=follow, sites="resid_post.1").table
        for follow in ("model", "text")
    }
    assert last["model"]["target_id"].tolist() == final
    assert last["text"]["target_id"].tolist() == [*ids[0, 1:].tolist(), final[-1]]
    given = logit_lens(tiny, ids, lens="logit", target=ids).table
    assert given["target_id"].tolist() == ids[0].tolist() * 2


def test_one_token_is_enough(tiny: Model) -> None:
    report = logit_lens(tiny, torch.tensor([[5]]), follow="text")
    assert len(report.table) == 2 and report.table["kl"].iloc[-1] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": ["resid_pst"]}, "did you mean 'resid_post'"),
        ({"sites": ["pattern"]}, "not in the residual stream"),
        ({"sites": ["resid_post.9"]}, "layers are 0 to 1"),
        ({"sites": ["z.0.7"]}, "heads are 0 to 3"),
        ({"sites": []}, "no site to read"),
        ({"lens": "tunde"}, "did you mean 'tuned'"),
        ({"follow": "me"}, "no choice of follow 'me'"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 98}, "wanted 1 to 97"),
        ({"target": 97}, "outside the vocabulary: tiny has ids 0 to 96"),
        ({"target": " Mary"}, "without a tokenizer"),
        ({"target": torch.tensor([1, 2])}, "one id for every position"),
        ({"positions": [7]}, "prompt 0 has 7 tokens, 0 to 6"),
        ({"positions": []}, "positions is empty"),
    ],
)
def test_bad_input_says_what_to_do(tiny: Model, options: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        logit_lens(tiny, some_ids(1), **options)


def test_a_target_of_several_tokens_says_how_it_splits(smollm: Model) -> None:
    assert smollm.tokens([smollm.token_id(" Mary")]) == [" Mary"]
    with pytest.raises(BadInput, match=r"' antidis.* is \d tokens .*name one of them"):
        smollm.token_id(" antidisestablishmentarianism")
    with pytest.raises(BadInput, match=r"'Mary Darcy' is \d tokens of smollm2-135m"):
        smollm.token_id("Mary Darcy")
    with pytest.raises(BadInput, match="the token is empty"):
        smollm.token_id("")


def test_heads_behind_a_norm_are_refused() -> None:
    with pytest.raises(Refused, match="read 'attn_write'"):
        logit_lens(model_of("gemma2"), some_ids(1), sites=["z"])


# --- the ridge lens ----------------------------------------------------------------------------


def test_a_planted_affine_map_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    A, b = torch.randn(6, 6, generator=generator).double(), torch.randn(6, generator=generator)
    x = torch.randn(200, 6, generator=generator).double() * torch.tensor([1, 1, 1, 1, 30, 1e4])
    x[:, 3] = 2.0  # never varies
    moments = Moments(6, [0])
    for part in x.split(17):
        moments.add({0: part, 1: part @ A + b})
    found = moments.solve(0, penalty=0)
    fresh = torch.randn(50, 6, generator=generator)
    fresh[:, 3] = 2.0
    expected = fresh.double() @ A + b
    assert torch.allclose((fresh @ found[0] + found[1]).double(), expected, atol=1e-4)


def test_a_large_penalty_leads_back_to_the_identity() -> None:
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).double()
    moments = Moments(4, [0])
    moments.add({0: x, 1: x.flip(1) + 3})
    A, b = moments.solve(0, penalty=1e9)
    assert torch.allclose(A, torch.eye(4), atol=1e-6)
    assert torch.allclose(b, ((x.flip(1) + 3).mean(0) - x.mean(0)).float(), atol=1e-4)


@pytest.fixture
def stream() -> Tensor:
    return torch.randint(97, (2000,), generator=torch.Generator().manual_seed(0))


def test_it_is_exact_where_the_model_is_linear(
    tiny_model: Callable[..., Model], stream: Tensor
) -> None:
    """With blocks that write a fixed multiple of nothing, every layer is the final one."""
    model = tiny_model()
    with torch.no_grad():
        for block in model.blocks:
            for projection in (block.self_attn.o_proj, block.mlp.down_proj):  # type: ignore[union-attr]
                projection.weight.zero_()  # type: ignore[union-attr]
    lens = fit_ridge_lens(model, text=stream, window=32, keep=False, progress=False)
    assert lens.held_out["kl_ridge"].max() < 1e-6
    table = logit_lens(model, some_ids(1), lens=lens).table
    assert table["kl"].max() < 1e-4


def test_it_is_nearer_to_the_end_and_is_read(tiny: Model, stream: Tensor) -> None:
    lens = fit_ridge_lens(tiny, text=stream, window=32, progress=False)
    assert (lens.held_out["kl_ridge"] < lens.held_out["kl_logit"]).all()
    fresh = torch.randint(97, (600,), generator=torch.Generator().manual_seed(9))
    elsewhere = held_out_kl(tiny, lens, fresh, window=32)
    assert (elsewhere["kl_ridge"] < elsewhere["kl_logit"]).all()

    ids = some_ids(1)
    report = logit_lens(tiny, ids, sites=["resid_pre", "resid_mid", "resid_post"])
    read_by = report.table.groupby("site")["lens"].unique()
    assert [read_by[s].tolist() for s in ("resid_pre", "resid_mid", "resid_post")] == [
        ["ridge"],
        ["logit"],
        ["ridge"],
    ]
    assert report.meta["lens"]["kind"] == "ridge" and len(report.tables["held_out"]) == 2
    pre, post = (
        report.table[(report.table["site"] == s) & (report.table["layer"] == layer)]
        for s, layer in (("resid_pre", 1), ("resid_post", 0))
    )
    assert np.array_equal(pre["kl"], post["kl"])
    assert (report.table.query("site == 'resid_post' and layer == 1")["kl"] == 0).all()
    plain = logit_lens(tiny, ids, lens="logit")
    assert "held_out" not in plain.tables and set(plain.table["lens"]) == {"logit"}


def with_quiet_direction(name: str) -> tuple[Model, Tensor]:
    """A model whose unembedding, gain included, is made deaf to one direction, and is loud elsewhere."""
    model = Model(FAMILIES[name](), id=name)
    generator = torch.Generator().manual_seed(0)
    planted = torch.randn(model.spec.d_model, generator=generator)
    planted = torch.nn.functional.normalize(planted - planted.mean(), dim=0)
    unread = torch.nn.functional.normalize(planted * model.final_norm.gain, dim=0)
    with torch.no_grad():
        weight = model.module.get_submodule(model.spec.unembedding).weight  # type: ignore[arg-type]
        weight.copy_(20 * (weight - torch.outer(weight @ unread, unread)))  # type: ignore[operator]
    return model, planted


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_quiet_direction_takes_size_and_says_nothing(name: str) -> None:
    model, planted = with_quiet_direction(name)
    v = quiet_direction(model, towards=planted)
    assert float(v @ planted) > 1 - 1e-5
    assert torch.equal(quiet_direction(model, towards=-planted), -v)
    x = torch.randn(5, model.spec.d_model, generator=torch.Generator().manual_seed(1))
    norm, moved = model.final_norm, x + 3 * v
    cap = model.spec.logit_softcap
    before, after = (unembedded(model, y, cap) for y in (x, moved))
    smaller = norm.scale(x) / norm.scale(moved)
    # Logits reach 100 here: float32 products of 32 terms.
    torch.testing.assert_close(after, before * smaller, rtol=1e-3, atol=1e-2)
    assert float(smaller.max()) < 1


def unembedded(model: Model, x: Tensor, cap: float | None) -> Tensor:
    """Logits before a soft-cap and without the final norm's bias, less their mean."""
    logits = uncapped_logits(model.spec, model.module, x) if cap else model.unembed(x)
    logits = logits - model.final_norm.bias @ model.W_U
    return logits - logits.mean(-1, keepdim=True)


def test_a_ridge_lens_that_would_be_too_sure_is_quietened(
    stream: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its predictions are unsure, its logits large: without the quiet direction the norm makes it sure."""
    model, _ = with_quiet_direction("llama")

    def fitted() -> AffineLens:
        return fit_ridge_lens(model, text=stream, window=32, keep=False, progress=False)

    lens = fitted()
    monkeypatch.setattr("interp.ridge_lens.QUIETS", (0.0,))
    plain = fitted()
    assert (lens.held_out["quiet"] > 0).all() and (plain.held_out["quiet"] == 0).all()
    assert (lens.held_out["kl_ridge"] < 0.6 * plain.held_out["kl_ridge"]).all()


def test_a_cached_lens_is_the_same_lens(tiny: Model, stream: Tensor) -> None:
    assert cached_lens(tiny) is None
    lens = fit_ridge_lens(tiny, text=stream, window=32, progress=False)
    again = cached_lens(tiny)
    assert again is not None and again.about == lens.about
    assert torch.equal(lens.A, again.A) and torch.equal(lens.b, again.b)


def test_a_fit_is_deterministic(tiny: Model, stream: Tensor) -> None:
    a, b = (
        fit_ridge_lens(tiny, text=stream, window=32, keep=False, progress=False) for _ in range(2)
    )
    assert torch.equal(a.A, b.A) and a.about["held_out"] == b.about["held_out"]


def test_groups_of_layers_are_the_same_fit(
    tiny: Model, stream: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit_ridge_lens(tiny, text=stream, window=32, keep=False, progress=False)
    monkeypatch.setattr("interp.ridge_lens.STATISTICS_BYTES", 1)
    parts = fit_ridge_lens(tiny, text=stream, window=32, keep=False, progress=False)
    assert torch.allclose(whole.A, parts.A, atol=1e-5)


def test_the_lens_of_another_model_is_refused(
    tiny: Model, tiny_model: Callable[..., Model], stream: Tensor, tmp_path: Path
) -> None:
    lens = fit_ridge_lens(tiny, text=stream, window=32, keep=False, progress=False)
    lens.save(tmp_path / "mine.safetensors")
    other = tiny_model(seed=1)
    assert cached_lens(other) is None
    with pytest.raises(BadInput, match="was fitted on tiny with weights"):
        AffineLens.load(tmp_path / "mine.safetensors", other)
    with pytest.raises(BadInput, match="fit one for it"):
        logit_lens(other, some_ids(1), lens=lens)


def test_a_damaged_cache_is_not_used(
    tiny: Model, stream: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    lens = fit_ridge_lens(tiny, text=stream, window=32, progress=False)
    path = lens_path(lens.about["model"]["sha256"], lens.about["text"]["sha256"])
    path.write_bytes(path.read_bytes()[:500])
    assert cached_lens(tiny) is None
    assert "is damaged" in caplog.text
    with pytest.raises(BadInput, match="no lens at"):
        AffineLens.load(path.with_name("other.safetensors"), tiny)


def test_the_cache_goes_by_weights_and_text(
    tiny: Model, stream: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another text is another lens, the latest is read, and a choice of text that is no more is not."""
    first = fit_ridge_lens(tiny, text=stream, window=32, progress=False)
    second = fit_ridge_lens(tiny, text=stream.flip(0), window=32, progress=False)
    paths = {
        lens_path(lens.about["model"]["sha256"], lens.about["text"]["sha256"])
        for lens in (first, second)
    }
    assert len(paths) == 2 and all(path.exists() for path in paths)
    found = cached_lens(tiny)
    assert found is not None and torch.equal(found.A, second.A)
    about = first.about | {"text": first.about["text"] | {"recipe": "at hand today"}}
    monkeypatch.setattr("interp.affine_lens.recipe", lambda: "at hand today")
    AffineLens(first.A, first.b, about).save(lens_path(about["model"]["sha256"], "at hand today"))
    found = cached_lens(tiny)
    assert found is not None and torch.equal(found.A, first.A)
    monkeypatch.setattr("interp.affine_lens.recipe", lambda: "at hand tomorrow")
    found = cached_lens(tiny)
    assert found is not None and torch.equal(found.A, second.A)


def test_the_english_at_hand_is_of_several_kinds() -> None:
    found = documents()
    kinds = {document.kind for document in found}
    assert {"prose", "documentation"} <= kinds
    assert len({document.text for document in found}) == len(found)
    assert found == documents()
    assert len(recipe()) == 64


class _Letters:
    """A tokenizer of characters."""

    bos_token_id = cls_token_id = eos_token_id = pad_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 97 for letter in text]}


def test_what_is_tested_on_was_not_fitted_on(tiny: Model) -> None:
    """Whole documents are held out, and a copy of a fitted one is not tested on."""
    tiny.tokenizer = _Letters()
    texts = [" ".join(f"{kind}{i}word{j}" for j in range(200)) for kind in "ab" for i in range(16)]
    found = [Document(text[0], text[:3], text) for text in texts]
    found[7] = Document("a", "copy", found[0].text)
    parts = _held_out_by_document(tiny, found, window=16)
    assert set(parts.test) == {"a", "b"} == set(parts.choose)
    of_documents = [set(map(tuple, _windows(tiny, [d.text], 16).tolist())) for d in found]

    def read(windows: Tensor) -> set[int]:
        rows = set(map(tuple, windows.tolist()))
        return {i for i, own in enumerate(of_documents) if own & rows and i != 7}

    assert read(parts.test["a"]) == {15} and read(parts.test["b"]) == {23, 31}
    assert read(parts.choose["a"]) == {3, 11}
    assert not read(parts.fit) & {3, 11, 15, 19, 27, 23, 31}


def test_too_little_text_is_said(tiny: Model) -> None:
    with pytest.raises(BadInput, match="give more text"):
        fit_ridge_lens(tiny, text=torch.arange(90), window=32)
    with pytest.raises(BadInput, match="without a tokenizer"):
        fit_ridge_lens(tiny)


# --- the default model --------------------------------------------------------------------------


def test_plain_hugging_face_agrees(smollm: Model) -> None:
    """Two layers, from `hidden_states`, which are not normed before the last."""
    batch = smollm.as_batch(STORE)
    table = logit_lens(smollm, STORE, lens="logit", target=" Mary", sites="resid_post").table
    module = smollm.module
    with torch.no_grad():
        out = module(batch.ids, output_hidden_states=True)
        final = out.logits[0].double().log_softmax(-1)
        for layer in (9, 27):
            hidden = out.hidden_states[layer + 1][0]
            gain = module.model.norm.weight  # type: ignore[union-attr]
            scale = hidden.pow(2).mean(-1, keepdim=True).add(module.config.rms_norm_eps).rsqrt()  # type: ignore[union-attr]
            logits = (hidden * scale * gain) @ module.lm_head.weight.T  # type: ignore[union-attr]
            q = logits.double().log_softmax(-1)
            rows = table[table["layer"] == layer]
            assert rows["top_token"].tolist() == smollm.tokens(q.argmax(-1).tolist())
            assert np.allclose(
                rows["kl"], (final.exp() * (final - q)).sum(-1), rtol=1e-4, atol=1e-4
            )
            mary = smollm.token_id(" Mary")
            assert np.allclose(rows["target_probability"], q[:, mary].exp(), rtol=1e-3)
            assert rows["target_rank"].tolist() == (q > q[:, [mary]]).sum(-1).tolist()
    end = table.query("layer == 29").iloc[-1]
    assert end["top_token"] == " Mary" and end["target_probability"] > 0.9


# --- the figure -------------------------------------------------------------------------------


def hostile(report: Report) -> Report:
    tables = dict(report.tables)
    tables["lens"] = tables["lens"].assign(top_token="<b>x</b>", token="<i>", target_token="a&b")
    tables["top"] = tables["top"].assign(token="<script>\n$x$")
    return Report(report.analysis, tables, report.arrays, report.meta)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_the_map_shows_the_table(tiny: Model, quantity: str) -> None:
    report = logit_lens(tiny, some_ids(2), lens="logit")
    figure = lens_map(report, quantity, prompt=1)
    cells = figure.data[0]
    table = report.table.query("prompt == 1")
    assert np.asarray(cells.z).shape == (2, 7)
    expected = table[quantity].to_numpy().reshape(2, 7)
    shown = np.asarray(cells.z, dtype=float)
    assert np.allclose(10**shown - 1 if quantity == "target_rank" else shown, expected, rtol=1e-5)
    assert np.asarray(cells.text).ravel().tolist() == table["top_token"].tolist()


def test_tokens_are_escaped(tiny: Model) -> None:
    figure = lens_map(hostile(logit_lens(tiny, some_ids(1), lens="logit")))
    cells = figure.data[0]
    strings = [*np.ravel(cells.text), *figure.layout.xaxis.ticktext, *np.ravel(cells.customdata)]
    for text in strings:
        assert "<" not in text.replace("<br>", "") and "$" not in text
    assert html.unescape(cells.text[0][0]) == "<b>x</b>"


def test_the_map_has_room_for_64_tokens(tiny: Model) -> None:
    report = logit_lens(tiny, some_ids(1, 64), lens="logit")
    figure = lens_map(report)
    assert figure.layout.width / 64 > 55 and len(figure.layout.xaxis.ticktext) == 64
    assert figure.data[0].textfont.size >= 10
    with pytest.raises(BadInput, match="prompts are 0 to 0"):
        lens_map(report, prompt=3)
    with pytest.raises(BadInput, match="did you mean 'entropy'"):
        lens_map(report, "entrop")
    with pytest.raises(BadInput, match="no site 'z'"):
        lens_map(report, site="z")
    with pytest.raises(BadInput, match="head=\\(1, 2\\): give one number"):
        lens_map(report, head=(1, 2))  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="no option of figure 'map' 'heads'; did you mean 'head'"):
        report.figure("map", heads=1)
