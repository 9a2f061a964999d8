"""Running a model: inputs in every form, stopping early, some logits, gradients, bad input."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.errors import BadInput, Refused
from interp.models import attention
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.cache import Run
from interp.run.edits import Edit
from interp.run.statistics import Mass
from tests.families import FAMILIES

IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
PADDED = torch.tensor([[0, 0, 7, 8, 9], [10, 11, 12, 13, 14]])


# --- inputs -----------------------------------------------------------------------------------------


def test_every_form_of_input_is_the_same_input(tiny: Model) -> None:
    logits = tiny.run(IDS).logits
    assert torch.equal(tiny.run(Batch.of_ids(IDS)).logits, logits)
    assert torch.equal(tiny.run({"input_ids": IDS}).logits, logits)
    # One row alone: matrix products of another shape, so to rounding (float32, two blocks).
    assert torch.allclose(tiny.run(IDS[0]).logits, logits[:1], atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_tokenizers_output_is_padded_like_a_batch(name: str) -> None:
    """Ids with a 0/1 mask, as Hugging Face tokenizers return them; GPT-2 must be told positions."""
    model = Model(FAMILIES[name](), id=name)
    mask = (PADDED != 0).long()
    ours = model.run(Batch.of_ids(PADDED, mask))
    theirs = model.run({"input_ids": PADDED, "attention_mask": mask})
    assert torch.equal(ours.logits, theirs.logits)
    edit = [Edit.mean("z.0")]
    assert torch.equal(
        model.run(Batch.of_ids(PADDED, mask), edits=edit).logits,
        model.run({"input_ids": PADDED, "attention_mask": mask}, edits=edit).logits,
    )


def test_batches() -> None:
    full, padded = Batch.of_ids(IDS), Batch.of_ids(PADDED, PADDED != 0)
    assert not full.padded and padded.padded
    assert padded.inputs["position_ids"].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    twice = padded.repeat(2)
    assert twice.size == 4 and torch.equal(twice.ids, torch.cat([PADDED, PADDED]))
    assert torch.equal(twice.rows(slice(2, 4)).ids, padded.ids)
    assert twice.mask is not None and torch.equal(twice.mask[2:], PADDED != 0)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), "no tokens"),
        (torch.tensor([[5, 97]]), "token id 97 is outside the vocabulary of 97"),
        (torch.tensor([[5, -1]]), "token id -1 is outside the vocabulary of 97"),
        (torch.zeros(1, 65, dtype=torch.long), r"65 tokens.* at most 64 \(n_ctx\)"),
        (torch.tensor([[5.7, 6.2]]), "whole: ids.long()"),
    ],
    ids=["empty", "too large an id", "a negative id", "too long", "floating point"],
)
def test_bad_ids(ids: Tensor, message: str, tiny: Model) -> None:
    with pytest.raises(BadInput, match=message):
        tiny.run(ids)


def test_text_needs_a_tokenizer_and_some_text(tiny: Model) -> None:
    with pytest.raises(BadInput, match="without a tokenizer"):
        tiny.run("When Mary")
    tiny.tokenizer = SimpleNamespace()
    for prompts in ("", [], ["fine", ""]):
        with pytest.raises(BadInput, match="empty"):
            tiny.tokenize(prompts)
    with pytest.raises(BadInput, match="neither 'left' nor 'right'"):
        tiny.tokenize("text", padding_side="middle")


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("resid_pst", "did you mean 'resid_post'"),
        ("z.2", "no site 'z.2'.*layers are 0 to 1"),
        ("z.1.4", "no site 'z.1.4'.*heads are 0 to 3"),
        ("k.1.2", "no site 'k.1.2'.*heads are 0 to 1"),
        ("v.0.3", "no site 'v.0.3'.*heads are 0 to 1"),
        ("resid_post.9", "layers are 0 to 1"),
    ],
)
def test_captures_that_are_not_there(site: str, message: str, tiny: Model) -> None:
    with pytest.raises(BadInput, match=message):
        tiny.run(IDS, capture=[site])


# --- stopping early, some logits --------------------------------------------------------------------


def blocks_run(model: Model, call: Callable[[], object]) -> int:
    """How many blocks `call` runs to their end."""
    count = 0

    def hook(*args: object) -> None:
        nonlocal count
        count += 1

    handles = [block.register_forward_hook(hook) for block in model.blocks]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return count


def test_stop_at_runs_that_many_blocks(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model(num_hidden_layers=4)
    whole = model.run(IDS, capture=["resid_pre", "resid_post", "z"])
    sites = {0: "resid_pre.0", 1: "resid_post.0", 2: "z.1", 3: "resid_post.2", 4: "resid_post.3"}
    for stop_at, site in sites.items():
        run = model.run(IDS, capture=[site], stop_at=stop_at)
        assert run.logits is None
        assert torch.equal(run.cache[site], whole.cache[site])
        n_run = blocks_run(model, lambda s=site, n=stop_at: model.run(IDS, capture=[s], stop_at=n))
        assert n_run == stop_at
    for stop_at in (-1, 5):
        with pytest.raises(BadInput, match="this model has 4 blocks"):
            model.run(IDS, stop_at=stop_at)
    with pytest.raises(BadInput, match="nothing to capture"):
        model.run(IDS, stop_at=0)


def test_without_logits_nothing_after_the_last_site_is_run(
    tiny_model: Callable[..., Model],
) -> None:
    model = tiny_model(num_hidden_layers=4)
    run = model.run(IDS, capture=["z.1"], logits=False)
    assert run.logits is None and run.cache["z.1"].shape == (2, 5, 4, 8)
    assert blocks_run(model, lambda: model.run(IDS, capture=["z.1"], logits=False)) == 2
    assert blocks_run(model, lambda: model.run(IDS, capture=["z.1"])) == 4
    rows = torch.ones(2, 5, dtype=torch.bool)
    first = {"first": Mass(torch.zeros(2, 5, 1, dtype=torch.long), rows)}
    assert blocks_run(model, lambda: model.run(IDS, statistics=first, logits=False)) == 4


@pytest.mark.parametrize(
    "given",
    [-1, [0, 1], None, torch.tensor(-1), torch.tensor([True]), torch.tensor([[1], [2]])],
    ids=str,
)
def test_logits_are_not_given_at_other_positions_than_asked(given: Any, tiny: Model) -> None:
    with pytest.raises(
        BadInput, match=r"wanted True, False, or a LongTensor .*torch.tensor\(\[-1\]\)"
    ):
        tiny.run(IDS, logits=given)
    with pytest.raises(BadInput, match="the prompts have 5 positions"):
        tiny.run(IDS, logits=torch.tensor([5]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([5, 6, 7], "token ids are a tensor"),
        ([[5, 6, 7]], "token ids are a tensor"),
        (None, "token ids are a tensor"),
        ({"input_ids": [[5, 6, 7]]}, "return_tensors='pt'"),
        ({"text": "When Mary"}, "model.run\\(text\\)"),
    ],
    ids=str,
)
def test_other_forms_of_input_are_told(data: Any, message: str, tiny: Model) -> None:
    tiny.tokenizer = SimpleNamespace()
    with pytest.raises(BadInput, match=message):
        tiny.run(data)


@pytest.mark.parametrize(
    ("capture", "message"),
    [
        (True, "not a bool"),
        ([("z", 1)], "a site is a text: 'z.1'"),
        ([5], "a site is a text"),
        (["logits"], "run.logits"),
        ("hidden_states", "'resid_pre'"),
        ("all", "each a site of every layer"),
    ],
    ids=str,
)
def test_other_forms_of_capture_are_told(capture: Any, message: str, tiny: Model) -> None:
    with pytest.raises(BadInput, match=message):
        tiny.run(IDS, capture=capture)


@pytest.mark.parametrize("name", ["llama", "granite", "bert"])
@pytest.mark.parametrize("positions", [[4], [0, 3], [3, 1, 1]], ids=str)
def test_logits_at_some_positions(name: str, positions: list[int]) -> None:
    """Equal to rounding: the unembedding of fewer rows may add in another order (float32)."""
    model = Model(FAMILIES[name](), id=name)
    whole = model.run(IDS).logits
    some = model.run(IDS, logits=torch.tensor(positions)).logits
    assert some.shape == (2, len(positions), 97)
    assert torch.allclose(some, whole[:, positions], atol=1e-5)


def test_only_the_last_positions_are_unembedded(tiny: Model) -> None:
    seen = []
    head = tiny.module.get_submodule(tiny.spec.unembedding or "")
    handle = head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    tiny.run(IDS, logits=torch.tensor([4]))
    handle.remove()
    assert seen == [(2, 1, 97)]


# --- replay -----------------------------------------------------------------------------------------


def test_replay_of_a_padded_batch_in_any_split(tiny: Model) -> None:
    """How many variants share a forward changes no result, beyond rounding (float32, two blocks)."""
    batch = Batch.of_ids(PADDED, PADDED != 0)
    run = tiny.run(batch, capture=["resid_pre"])
    variants = [
        [Edit.zero("z", heads=[(1, 0)])],
        [Edit.mean("z", heads=[(0, 3)])],
        [],
        [Edit.resample("resid_post.0", seed=1), Edit.zero("mlp_write.1")],
        [Edit.zero("z", heads=[(1, 1)], positions=torch.tensor([4, 2]))],
        [Edit.scale("attn_write.0", 0.5, positions=PADDED != 0)],
    ]
    wanted = [tiny.run(batch, edits=variant).logits for variant in variants]
    for tokens in (1, 20, 10_000):
        done: list[int] = []
        got = tiny.replay(
            run, variants, lambda r: r.logits, progress=done.append, tokens_per_forward=tokens
        )
        assert sum(done) == len(variants)
        for ours, theirs in zip(got, wanted, strict=True):
            assert torch.allclose(ours, theirs, atol=2e-5)


def test_a_variant_starts_at_its_first_edit(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model(num_hidden_layers=4)
    run = model.run(IDS, capture=["resid_pre"])
    calls = dict.fromkeys(range(4), 0)

    def count(layer: int) -> Callable[..., None]:
        def hook(*args: object) -> None:
            calls[layer] += 1

        return hook

    handles = [
        block.self_attn.register_forward_hook(count(layer))
        for layer, block in enumerate(model.blocks)
    ]
    model.replay(run, [[Edit.zero("z", heads=[(2, h)])] for h in range(4)], lambda r: r.logits)
    for handle in handles:
        handle.remove()
    assert calls == {0: 0, 1: 0, 2: 1, 3: 1}


def test_variants_of_rows_that_see_each_other_are_replayed_one_by_one() -> None:
    """Logits less the mean over rows (as CLAP compares each sound with each text): not over those of all variants."""
    module = FAMILIES["gpt2"]()
    module.lm_head.register_forward_hook(lambda head, args, out: out - out.mean(0, keepdim=True))
    model = Model(module)
    clean = model.run(IDS, ["resid_pre"])
    variants = [[Edit.zero("z", heads=[(1, head)])] for head in (0, 1)]
    found = model.replay(clean, variants, lambda run: run.logits)
    for edits, logits in zip(variants, found, strict=True):
        torch.testing.assert_close(logits, model.run(IDS, edits=edits).logits, rtol=0, atol=1e-5)


def test_a_replay_captures_and_picks_logits_like_a_run(tiny: Model) -> None:
    run = tiny.run(IDS, capture=["resid_pre"])
    edits = [[Edit.zero("z", heads=[(1, h)])] for h in range(4)]

    def both(variant: Run) -> Tensor:
        assert variant.logits is not None and variant.logits.shape == (2, 1, 97)
        return torch.cat([variant.logits.flatten(), variant.cache["z.1"].flatten()])

    got = tiny.replay(run, edits, both, logits=torch.tensor([4]), capture=["z.1"])
    for variant, found in zip(edits, got, strict=True):
        rerun = tiny.run(IDS, edits=variant, capture=["z.1"], logits=torch.tensor([4]))
        assert torch.allclose(found, both(rerun), atol=1e-5)


def test_a_replay_needs_a_clean_run(tiny: Model) -> None:
    with pytest.raises(BadInput, match="resid_pre"):
        tiny.replay(tiny.run(IDS), [[Edit.zero("z.0")]], lambda r: r.logits)


# --- gradients --------------------------------------------------------------------------------------

SITES = (
    "embed",
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "attn_write",
    "mlp_out",
    "mlp_write",
    "q",
    "k",
    "v",
    "scores",
    "pattern",
    "z",
)


@cache
def double(name: str) -> Model:
    return Model(FAMILIES[name]().double(), id=name)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(
    ("name", "step", "allowed"),
    [("gpt2", 1e-5, 1e-6), ("opt", 1e-5, 1e-6), ("granite", 1e-2, 2e-2)],
    ids=["gpt2", "opt", "granite"],
)
def test_gradients_are_finite_differences(
    name: str, step: float, allowed: float, site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along a random direction of every layer, in float64; patterns would come in two chunks.

    GPT-2 and OPT (which flattens batch and position inside its blocks) compute in float64
    throughout: a central difference of step 1e-5 is good to 1e-10 and rounding. Granite (scaled
    writes, grouped heads) takes its norms in float32 whatever its dtype, so the step is large and
    the tolerance is loose.
    """
    monkeypatch.setattr(attention, "CHUNK_BYTES", 1)
    model = double(name)
    ids = torch.randint(10, 97, (2, 20), generator=torch.Generator().manual_seed(0))

    def target(logits: Tensor) -> Tensor:
        picked = logits[0, -1, 5] - logits[0, -1, 6] + logits[1, 4, 7]
        return picked / model.spec.logit_scale

    run = model.run(ids, capture=[site], grad=True)
    assert run.gradients(target(run.logits), site).shape == run.cache[site].shape
    for layer in model.layers_with(site):
        place = f"{site}.{layer}"
        value = run.cache[place].detach()
        generator = torch.Generator().manual_seed(layer)
        direction = torch.randn(value.shape, dtype=value.dtype, generator=generator)
        if site in ("scores", "pattern"):
            direction = direction.tril()  # what a query cannot see stays unseen
        moved = [
            model.run(ids, edits=[Edit.patch(place, value + sign * step * direction)])
            for sign in (1, -1)
        ]
        difference = float(target(moved[0].logits) - target(moved[1].logits)) / (2 * step)
        along = float((run.gradients(target(run.logits), place) * direction).sum())
        assert abs(difference) > 0.002
        assert abs(along - difference) < allowed * abs(difference)


def test_a_site_after_the_target_has_no_gradient(tiny: Model) -> None:
    run = tiny.run(IDS, capture=["resid_post", "z"], grad=True)
    early = run.cache["resid_post.0"].sum()
    assert not run.gradients(early, "z.1").any()
    assert run.gradients(early, "z.0").abs().min() > 0
    assert run.gradients(early, "z.0.2").shape == (2, 5, 8)
    assert run.gradients(early, "z").shape == (2, 5, 2, 4, 8)


def test_gradients_need_a_graph(tiny: Model) -> None:
    run = tiny.run(IDS, capture=["z"])
    assert not run.logits.requires_grad
    with pytest.raises(BadInput, match="grad=True"):
        run.gradients(run.logits.sum(), "z")
    assert all(parameter.grad is None for parameter in tiny.module.parameters())
    other = tiny.run(IDS, capture=["z"], grad=True)
    with pytest.raises(BadInput, match="'z' of this run has no gradient"):
        run.gradients(other.logits.sum(), "z")
    with pytest.raises(BadInput, match=r"shape \[97\], wanted one number"):
        other.gradients(other.logits[0, -1], "z")
    assert tiny.run(IDS, grad=True).logits.requires_grad


def test_gradients_change_no_logit(tiny: Model) -> None:
    plain = tiny.run(IDS).logits
    assert torch.equal(tiny.run(IDS, grad=True).logits.detach(), plain)


def test_an_edit_of_no_heads_is_none(tiny: Model) -> None:
    clean, none = tiny.run(IDS, capture=["resid_pre"]), [Edit.zero("z", heads=[])]
    assert torch.equal(tiny.run(IDS, edits=none).logits, clean.logits)
    (replayed,) = tiny.replay(clean, [none], lambda run: run.logits)
    assert torch.allclose(replayed, clean.logits, atol=1e-5)


def test_a_site_that_a_forward_passes_by_is_refused() -> None:
    """An MLP that reads a layer's weights and does not call it, for long inputs alone: an edit would do nothing."""
    module = FAMILIES["llama"]()
    for layer in module.model.layers:

        def forward(x: Tensor, of: Any = layer.mlp) -> Tensor:
            made = of.act_fn(of.gate_proj(x)) * of.up_proj(x)
            short = x.shape[1] < 30
            return of.down_proj(made) if short else made @ of.down_proj.weight.T

        layer.mlp.forward = forward
    model = Model(module, id="passing")
    edit, long = Edit.zero("mlp_post.1"), torch.arange(10, 50)
    assert (model.run(IDS, edits=[edit]).logits - model.run(IDS).logits).abs().max() > 1e-3
    clean = model.run(long, capture=["resid_pre"])
    for run in (
        lambda: model.run(long, edits=[edit]),
        lambda: model.run(long, capture=["mlp_post"]),
        lambda: model.replay(clean, [[edit]], lambda got: got.logits),
    ):
        with pytest.raises(Refused, match=r"'mlp_post\.\d' was passed by"):
            run()
    stopped = model.run(
        long, capture=["resid_pre.0", "mlp_post.2"], stop_at=1
    )  # before it comes there
    assert list(stopped.cache) == ["resid_pre"]


@pytest.mark.parametrize("weight", ["W_O", "b_O", "W_V", "W_out", "b_out"])
def test_weights_of_a_layer_that_is_not_there(tiny: Model, weight: str) -> None:
    assert torch.equal(getattr(tiny, weight)(-1), getattr(tiny, weight)(tiny.n_layers - 1))
    with pytest.raises(BadInput, match=f"no layer 9 in .*: layers are 0 to {tiny.n_layers - 1}"):
        getattr(tiny, weight)(9)
