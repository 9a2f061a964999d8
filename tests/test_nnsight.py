"""nnsight models opened here, sites inside its traces, and runs through its simulation of NDIF.

`remote="local"` is nnsight's own: a trace is serialised as for NDIF, deserialised with the user's modules
hidden, and run here. What comes back must be what our hooks see on the same weights. Both read the same
computation but for attention, which runs through our function here and the family's own there, and for
residual multipliers, which are solved for on other random weights: 1e-5 of the largest value in float32.
"""

from __future__ import annotations

import re
import runpy
import socket
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from nnsight import TransformersModel

import interp
from interp import nnsight as bridge
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.models.probe import probe
from interp.remote import RemoteModel
from interp.run.edits import Edit
from interp.sites import Site
from interp.skeleton import skeleton
from tests.families import FAMILIES
from tests.ground_truth.induction_model import character_tokenizer

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 20, 6, 5]])
SITES = (
    *("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "attn_write"),
    *("mlp_out", "mlp_write", "mlp_post", "z"),
)
KINDS = ("llama", "gpt2", "gemma2", "granite", "opt", "gpt_neox")


def same(ours: Any, theirs: Any) -> bool:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max()) <= 1e-5 * float(ours.abs().max())


def test_versions() -> None:
    assert version("nnsight").startswith("0.8"), "the trace's body was written for 0.8"


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(kind)
    FAMILIES[kind]().save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


def lazy(folder: Path) -> TransformersModel:
    """An nnsight model with its structure and no weights."""
    return TransformersModel(
        str(folder), task="text-generation", tokenizer=character_tokenizer(), dtype=torch.float32
    )


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Model, RemoteModel]:
    """The model here, and the same one as it is reached remotely, its weights not loaded."""
    theirs = lazy(folder)
    remote = interp.load(theirs, remote="local")
    assert isinstance(remote, RemoteModel) and not theirs.dispatched
    return interp.load(folder), remote


def served(model: Model) -> list[str]:
    return [site for site in SITES if site not in model.spec.refused]


def test_captures_are_what_hooks_see_here(pair: tuple[Model, RemoteModel]) -> None:
    here, there = pair
    sites = served(here)
    wanted, got = here.run(IDS, capture=sites), there.run(IDS, capture=sites)
    assert same(got.logits, wanted.logits)
    assert sorted(got.cache) == sorted(sites)
    for site in sites:
        assert same(got.cache[site], wanted.cache[site]), site
    assert there.spec.facts == here.spec.facts


def test_a_site_whose_module_flattens_positions_into_rows_is_no_place_in_a_trace() -> None:
    """OPT's MLP reads [batch · pos d_mlp]: what stands there first is no row."""
    model = Model(FAMILIES["opt"](), None, "opt")
    assert bridge.address(model, "mlp_post.1").path == model.spec.blocks[1].W_out
    with pytest.raises(Refused, match=r"holds 'mlp_post.1' as \(\d+, \d+\) in the input of .*fc2"):
        bridge.at(model, "mlp_post.1")
    for site in ("z.0.1", "resid_pre.1", "resid_post.0", "attn_out.1"):
        assert bridge.at(model, site).address == bridge.address(model, site)


def test_a_write_scaled_channel_by_channel_is_no_module_s_output() -> None:
    """The numbers are fitted to the weights that were probed; the module's output would not be the write."""
    model = Model(FAMILIES["muse_spark"](), None, "muse_spark")
    assert model.spec.blocks[0].attn_write.channels is not None
    with pytest.raises(Refused, match="no one module's input or output is this site"):
        bridge.addresses(model)[Site("attn_write", 0)]


def test_edits_do_there_what_they_do_here(pair: tuple[Model, RemoteModel]) -> None:
    here, there = pair
    d_model = here.spec.d_model
    other = torch.randn(2, 5, d_model, generator=torch.Generator().manual_seed(1))
    for edit in (
        Edit.zero("z.0.1"),
        Edit.zero("mlp_write.1", positions=torch.tensor([[True] * 3 + [False] * 2] * 2)),
        Edit.scale("z", 2.0, heads=[(0, 2), (1, 3)], positions=[1, 2]),
        Edit.add("resid_post.0", torch.arange(d_model) / d_model),
        Edit.add("attn_write.1", torch.linspace(-1, 2, d_model)),
        Edit.patch("attn_out.1", other, positions=torch.tensor([0, 4])),
        Edit.patch("resid_pre", {0: other, 1: 2 * other, 2: other}, positions=[3]),
        Edit.mean("z.1.3"),
        Edit.mean("mlp_write.0", mean={0: torch.ones(d_model)}),
        Edit.resample("mlp_post.0"),
    ):
        wanted = here.run(IDS, capture=["resid_post", "z"], edits=[edit])
        got = there.run(IDS, capture=["resid_post", "z"], edits=[edit])
        assert not same(wanted.logits, here.run(IDS).logits)
        for mine, theirs in (
            (wanted.logits, got.logits),
            (wanted.cache["resid_post"], got.cache["resid_post"]),
            (wanted.cache["z"], got.cache["z"]),
        ):
            assert same(mine, theirs), edit.site


def test_padding_positions_and_stopping(pair: tuple[Model, RemoteModel]) -> None:
    here, there = pair
    batch = there.tokenize(["abab", "cdabcdefg"], padding_side="left")
    wanted = here.run(batch, capture=["z"])
    got = there.run(batch, capture=["z"], logits=torch.tensor([-1]))
    mask = batch.mask
    assert mask is not None and same(got.cache["z"][mask], wanted.cache["z"][mask])
    assert same(got.logits[:, 0], wanted.logits[:, -1])  # type: ignore[index]
    early = there.run(batch, capture=["resid_post.0"], logits=False)
    assert early.logits is None and list(early.cache) == ["resid_post"]


def test_served_weights_are_verified(pair: tuple[Model, RemoteModel]) -> None:
    checks = pair[1].verify()
    assert len(checks) == 2 and all(check.passed for check in checks)
    assert max(check.error for check in checks) < 1e-5  # float32
    assert all(check.detail.startswith("each block") for check in checks)
    assert "random weights" in pair[1].notes[0]


def test_opened_locally_it_is_the_module(folder: Path) -> None:
    theirs = lazy(folder)
    model = interp.load(theirs)  # dispatched on the way
    assert model.module is theirs._module and model.tokenizer is not None
    wanted = interp.load(folder).run(IDS, capture=["pattern"])
    got = model.run(IDS, capture=["pattern"])
    assert torch.equal(got.cache["pattern"], wanted.cache["pattern"])
    with theirs.trace(IDS):  # nnsight goes on working
        logits = theirs.output.logits.save()
    assert torch.allclose(logits, wanted.logits, atol=1e-5)  # type: ignore[arg-type]


def test_sites_inside_a_trace(folder: Path) -> None:
    theirs, here = lazy(folder), interp.load(folder)
    z, write = bridge.at(theirs, "z.0.1"), bridge.at(theirs, "blocks.1.hook_attn_out")
    where = bridge.address(theirs, "z.0.1")
    assert where.side == "input" and where.head == 1 and where.heads is not None
    with theirs.trace(IDS):
        before = z.get().clone().save()
        z.set(0.0)
        after = write.get().save()
        logits = theirs.output.logits.save()
    clean = here.run(IDS, capture=["z"])
    wanted = here.run(IDS, capture=["attn_write"], edits=[Edit.zero("z.0.1")])
    assert torch.allclose(before, clean.cache["z.0.1"], atol=1e-6)
    assert torch.allclose(after, wanted.cache["attn_write.1"], atol=1e-6)
    assert torch.allclose(logits, wanted.logits, atol=1e-5)  # type: ignore[arg-type]


def test_a_site_is_first_asked_for_inside_a_trace(llama: Path) -> None:
    """Finding it runs a forward, which must not be taken for the traced one."""
    theirs = lazy(llama)
    with theirs.trace(IDS):
        theirs.lm_head.output.save()  # dispatched on the way
    assert theirs.dispatched
    with theirs.trace(IDS):
        z = bridge.at(theirs, "z.1").get().save()
    assert same(z, interp.load(llama).run(IDS, capture=["z"]).cache["z.1"])


def test_what_the_docs_show_as_nnsights_runs(llama: Path, tmp_path: Path) -> None:
    text = (Path(interp.__file__).parents[1] / "docs" / "coming-from.md").read_text()
    blocks = re.findall(r'```python title="nnsight"\n(.*?)```', text, re.DOTALL)
    wanted = ("hidden", "logits", "out", "gradient")
    for number, (block, name) in enumerate(zip(blocks, wanted, strict=True)):
        path = tmp_path / f"block_{number}.py"  # a trace reads its own source
        path.write_text(block)
        theirs = TransformersModel(
            str(llama), task="text-generation", tokenizer=character_tokenizer(), dispatch=True
        )
        vector = torch.ones(theirs.config.hidden_size)
        got = runpy.run_path(
            str(path), {"model": theirs, "prompt": torch.tensor([[5, 6, 7]]), "vector": vector}
        )
        assert isinstance(got[name], torch.Tensor), block


def test_sites_inside_a_remote_trace(folder: Path) -> None:
    """By their strings; objects of ours would have to be imported there, and say so."""
    theirs, here = lazy(folder), interp.load(folder)
    path = bridge.address(theirs, "z.1").path
    with theirs.trace(IDS, remote="local"):
        flat = theirs.get(path).input.save()
    wanted = here.run(IDS, capture=["z"]).cache["z.1"]
    assert torch.allclose(flat.reshape(wanted.shape), wanted, atol=1e-5)
    place = bridge.at(theirs, "z.1")
    with pytest.raises(BadInput, match="do not travel with a remote trace"):  # noqa: SIM117
        with theirs.trace(IDS, remote="local"):
            z = place.get().save()  # noqa: F841
    again = here.run(IDS, capture=["z"]).cache["z.1"]  # our attention function is still ours
    assert torch.equal(again, wanted)


# --- what does not work, said before anything is sent -------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama-only")
    FAMILIES["llama"]().save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


def test_the_deprecated_name_opens_too(llama: Path) -> None:
    with pytest.warns(nnsight.NNsightDeprecationWarning):
        theirs = nnsight.LanguageModel(
            str(llama), tokenizer=character_tokenizer(), dtype=torch.float32
        )
    assert interp.load(theirs).n_layers == 3


def test_refusals_say_why_and_what_instead(llama: Path) -> None:
    there = interp.load(lazy(llama), remote="local")
    for ask, reason in (
        (lambda: there.run(IDS, capture=["pattern.0"]), "inside the attention function"),
        (lambda: there.run(IDS, edits=[Edit.zero("q.0.1")]), "inside the attention function"),
        (lambda: there.run(IDS, edits=[Edit.apply("z", lambda x, seen: -x)]), "use Edit.zero"),
        (lambda: there.run(IDS, edits=[Edit.zero("resid_mid")]), "edit attn_write instead"),
        (lambda: there.run(IDS, grad=True), "interp.load"),
        (lambda: there.replay(None, [], len), "cannot be called again"),
        (lambda: there.W_O(0), "weights do not leave"),
        (lambda: there.W_U, "weights do not leave"),
        (lambda: there.final_norm, "weights do not leave"),
    ):
        with pytest.raises(Refused, match=reason):
            ask()
    for wrong in (Edit.patch("z.0", torch.ones(2)), Edit.mean("z.0", mean={0: torch.ones(2)})):
        with pytest.raises(BadInput, match=r"values of shape \(2,\) for an activation of shape"):
            there.run(IDS, edits=[wrong])
    with pytest.raises(BadInput, match="did you mean 'resid_post'"):
        there.run(IDS, capture=["resid_pst"])
    with pytest.raises(BadInput, match="nothing to do"):
        there.run(IDS, logits=False)
    with pytest.raises(BadInput, match="layers are 0 to 2"):
        bridge.at(there.nnsight, "z.7")  # type: ignore[attr-defined]
    with pytest.raises(BadInput, match="names no layer"):
        bridge.at(there.nnsight, "z")  # type: ignore[attr-defined]


def test_without_a_key_nothing_is_sent(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", None)
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "https://api.ndif.us")
    with pytest.raises(BadInput, match="NDIF needs a key and none is set"):
        interp.load(lazy(llama), remote=True)


def test_without_a_network_nothing_is_sent(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "not-a-key")
    monkeypatch.setattr(socket, "create_connection", unreachable)
    there = interp.load(lazy(llama), remote=True)
    with pytest.raises(BadInput, match="nothing answers at https"):
        there.run(IDS, capture=["z"])
    with pytest.raises(BadInput, match="nothing answers at http://localhost:9"):
        interp.load(lazy(llama), remote="http://localhost:9").run(IDS)


def test_remote_is_for_nnsight_models(llama: Path) -> None:
    with pytest.raises(BadInput, match="this is a str"):
        interp.load(str(llama), remote=True)
    with pytest.raises(BadInput, match="device was given with remote=True"):
        interp.load(lazy(llama), remote="local", device="cpu")


def test_every_pass_has_a_reason() -> None:
    rows = bridge.passes()
    assert {row["remote"] for row in rows} == {True, False}
    assert all(row["why"] for row in rows)


# --- maps of models whose weights are not here --------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["llama", "qwen3_moe", "deepseek_v3", "opt", "roberta", "gpt_neox"]
)
def test_a_skeleton_has_the_map_of_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found without weights, on a copy of other widths: the addresses and sizes are those of the model."""
    module = FAMILIES[name]()
    wanted = probe(module)
    with torch.device("meta"):
        bare = type(module)(module.config)
    monkeypatch.setattr("interp.skeleton.SMALL", 0)  # a narrow copy or none
    found, _ = skeleton(bare)
    assert found.facts == wanted.facts and found.refused == wanted.refused
    for block, other in zip(found.blocks, wanted.blocks, strict=True):
        for address in ("name", "attention", "W_O", "attn_out", "W_out", "mlp_out", "n_heads"):
            assert getattr(block, address) == getattr(other, address)
        assert (block.n_kv_heads, block.d_head, block.d_mlp) == (
            other.n_kv_heads,
            other.d_head,
            other.d_mlp,
        )
