"""Models of sound whose token ids are of several codebooks at every position.

Tolerance: float32, three blocks deep, as in `test_families`.
"""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from torch import Tensor

from benchmarks.architectures import runs
from benchmarks.tiny_configs import tiny_model
from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.edits import Edit
from interp.sites import AXES

ROUNDING = 1e-5
MADE = {
    "rows": ("musicgen", "MusicgenForCausalLM", ""),
    "last axis": ("dia", "DiaForConditionalGeneration", "encoder-decoder"),
}
every = pytest.mark.parametrize("name", MADE)


@cache
def model_of(name: str) -> Model:
    of, model, kind = MADE[name]
    return Model(tiny_model(of, model, partial(runs, kind=kind, strict=True)), id=name)


def ids(*shape: int) -> Tensor:
    return torch.randint(10, 97, shape, generator=torch.Generator().manual_seed(3))


def inputs(name: str) -> dict[str, Tensor]:
    """Two rows of six positions, the second padded after four."""
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    if name == "rows":
        return {"input_ids": ids(8, 6), "attention_mask": mask}
    target = {"decoder_input_ids": ids(2, 6, 9), "decoder_attention_mask": mask}
    return {"input_ids": ids(2, 7), **target}


def real(logits: Tensor) -> Tensor:
    """Logits [row book position d_vocab] of the positions that are no padding."""
    by_row = logits.unflatten(0, (2, -1))
    return torch.cat([by_row[0].flatten(0, 1), by_row[1][:, :4].flatten(0, 1)])


def close(got: Tensor, wanted: Tensor) -> bool:
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max()) < ROUNDING * max(1.0, float(wanted.abs().max()))


@every
def test_sites_have_the_rows_of_the_batch(name: str) -> None:
    model, given = model_of(name), inputs(name)
    assert set(model.spec.refused) == model.spec.absent == {"unembedding"}
    assert all(check.passed for check in model.spec.checks)
    sites = [site for site in AXES if model.layers_with(site)]
    run = model.run(given, capture=sites)
    with torch.no_grad():
        plain = model.module(**given).logits
    assert len(plain) == 2 * (4 if name == "rows" else 9)
    assert close(real(run.logits), real(plain))
    assert run.batch.size == 2 and run.batch.mask is not None
    assert run.batch.mask.sum(1).tolist() == [6, 4]
    assert run.cache["resid_post.1"].shape[:2] == (2, 6)
    same = [Edit.apply(site, lambda x, seen: x) for site in sites]
    assert close(model.run(given, edits=same).logits, run.logits)
    with pytest.raises(Refused, match="several heads"):
        model.unembed(run.cache["resid_post.2"])


@every
def test_the_stream_begins_with_the_sum_of_the_codebooks_embeddings(name: str) -> None:
    """And with the positions', where there are any: what another id of one book changes is one embedding's row."""
    model, given = model_of(name), inputs(name)
    key = "input_ids" if name == "rows" else "decoder_input_ids"
    other = {**given, key: given[key].clone()}
    at = (
        (1, 3) if name == "rows" else (0, 3, 1)
    )  # the second book of the first row, its fourth position
    other[key][at] = (given[key][at] - 9) % 87 + 10
    before, after = (model.run(x, capture=["embed"]).cache["embed"] for x in (given, other))
    changed = (after - before).abs().amax(-1) > 0
    assert changed.nonzero().tolist() == [[0, 3]]
    if name == "rows":
        table = model.module.model.decoder.embed_tokens[1].weight
        wanted = table[other[key][at]] - table[given[key][at]]
        assert close((after - before)[0, 3], wanted.detach())


@every
def test_a_replay_is_a_run_anew(name: str) -> None:
    model, given = model_of(name), inputs(name)
    clean = model.run(given, capture=["resid_pre"])
    variants = [[Edit.zero("z", heads=[(1, 2)])], [Edit.mean("resid_mid.1")], []]
    replayed = model.replay(clean, variants, lambda run: (run.logits, run.batch))
    for (logits, batch), edits in zip(replayed, variants, strict=True):
        assert close(logits, model.run(given, edits=edits).logits)
        assert torch.equal(batch.ids, clean.batch.ids)
    assert not close(replayed[0][0], replayed[2][0])


def test_rows_of_a_batch_keep_their_codebooks() -> None:
    batch = Batch.of_ids(ids(8, 6)).of_several_rows(4)
    assert (batch.size, batch.repeat(3).size) == (2, 6)
    assert torch.equal(batch.rows(slice(1, 2)).ids, batch.ids[4:])
    assert batch.rows(slice(1, 2)).size == 1


def test_a_decoder_begins_with_the_start_token_of_every_codebook() -> None:
    model = model_of("last axis")
    batch = model.run({"input_ids": ids(2, 7)}).batch
    assert batch.ids.shape == (2, 1, 9) and len(batch.ids.unique()) == 1


@every
def test_ids_of_one_codebook_are_refused(name: str) -> None:
    model = model_of(name)
    given = {"input_ids": ids(3, 6)}
    if name == "last axis":
        given["decoder_input_ids"] = ids(3, 6)
    with pytest.raises(BadInput, match=r"several codebooks.*got shape \(3, 6\)"):
        model.run(given)
    with pytest.raises(Refused, match="no token embedding"):
        _ = model.W_E
