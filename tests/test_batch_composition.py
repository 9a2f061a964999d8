"""A prompt's results do not depend on what else is in its batch, nor on the side of the padding.

The sums of a row are added in another order in a batch of another size: float32, three blocks, so 1e-5 of the
largest value. Attribution, the lens and text: tests/test_attribution.py, test_lens.py, test_generate.py.
"""

import pytest
import torch
from torch import Tensor

from interp import transformer_lens
from interp.generate import generate
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.statistics import Distance, Entropy, Expected, Mass, PeakColumn
from tests.families import FAMILIES

SITES = ["embed", "q", "k", "v", "z", "attn_out", "mlp_post", "mlp_out", "resid_mid", "resid_post"]
MAPS = ["scores", "pattern"]
LENGTHS = (4, 7, 9)
ROWS = [torch.randint(10, 90, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]


@pytest.fixture(scope="module", params=["gpt2", "llama", "gemma2"])
def model(request) -> Model:
    return Model(FAMILIES[request.param]())


def batch_of(rows: list[Tensor], side: str) -> Batch:
    """One padded batch; padding holds a token that also stands in the prompts."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), 11), torch.zeros(len(rows), longest).bool()
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = row, True
    return Batch.of_ids(ids, mask)


def statistics(mask: Tensor) -> dict:
    """One of every kind, of real queries that see two real keys or more."""
    n = mask.shape[1]
    place, count = torch.arange(n).expand_as(mask), mask.cumsum(-1)
    rows = mask & (count >= 2)
    before = torch.where(rows, place - 1, -1)[..., None]
    return {
        "previous": Mass(before, rows),
        "entropy": Entropy(rows, count),
        "first": Expected((mask & (count == 1)).float(), rows),
        "distance": Distance(mask, rows),
        "peak": PeakColumn(mask & (count <= 2), rows),
    }


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_is_the_same_in_any_batch(model: Model, side: str) -> None:
    sites = [site for site in SITES if model.spec.refused.get(site) is None]
    for rows in (ROWS, ROWS[::-1], [ROWS[0], ROWS[2]]):
        batch = batch_of(rows, side)
        assert batch.mask is not None
        run = model.run(batch, [*sites, *MAPS], statistics=statistics(batch.mask))
        assert run.logits is not None
        for i, row in enumerate(rows):
            real = batch.mask[i]
            own = Batch.of_ids(row[None])
            alone = model.run(own, [*sites, *MAPS], statistics=statistics(own.mask))
            close(run.logits[i, real], alone.logits[0])
            for site in sites:
                close(run.cache[site][i, real], alone.cache[site][0])
            for layer in alone.cache.layers("pattern"):
                seen = run.cache[f"pattern.{layer}"][i][:, real][..., real]
                close(seen, alone.cache[f"pattern.{layer}"][0])
                close(seen.sum(-1), torch.ones_like(seen[..., 0]))  # padding gets no attention
                scores = alone.cache[f"scores.{layer}"][0]
                shown = scores > torch.finfo(scores.dtype).min
                own_scores = run.cache[f"scores.{layer}"][i][:, real][..., real]
                close(own_scores[shown], scores[shown])
            for name, value in alone.statistics.items():
                close(run.statistics[name][i], value[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompts_gradients_are_the_same_in_any_batch(model: Model, side: str) -> None:
    batch = batch_of(ROWS, side)
    run = model.run(batch, ["z", "resid_post"], grad=True)
    assert run.logits is not None and batch.mask is not None
    last = [int(mask.nonzero()[-1]) for mask in batch.mask]
    target = sum(run.logits[i, at, 20] for i, at in enumerate(last))
    assert isinstance(target, Tensor)
    for site in ("z", "resid_post"):
        slopes = run.gradients(target, site)
        for i, row in enumerate(ROWS):
            alone = model.run(row, ["z", "resid_post"], grad=True)
            assert alone.logits is not None
            close(slopes[i, batch.mask[i]], alone.gradients(alone.logits[0, -1, 20], site)[0])
            assert not slopes[i, ~batch.mask[i]].any()


# --- padded ids without a mask --------------------------------------------------------------------------

REAL = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
PAD, EOS = 3, 4
WAYS = {
    "run": lambda model, ids: model.run(ids),
    "inputs by name": lambda model, ids: model.run({"input_ids": ids}),
    "a view": lambda model, ids: transformer_lens.view(model)(ids),
    "generate": lambda model, ids: generate(model, ids, max_new_tokens=1),
}


def padded(side: str) -> Tensor:
    ids = REAL.clone()
    ids[1, slice(2) if side == "left" else slice(2, 4)] = PAD
    return ids


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_ids_without_a_mask_are_told(way: str, side: str, tiny_model, caplog) -> None:
    model = tiny_model(pad_token_id=PAD, eos_token_id=EOS)
    ids = padded(side)
    ask = WAYS[way]
    ask(model, REAL)
    ask(model, torch.where(ids == PAD, EOS, ids))  # a text may end with it
    assert not caplog.records
    ask(model, ids)
    ask(model, ids)
    (said,) = (record.getMessage() for record in caplog.records)
    assert "its padding token, 3, and no mask" in said and "'attention_mask': mask" in said


def test_a_mask_or_a_padding_token_that_ends_texts_is_not_told(tiny_model, caplog) -> None:
    model = tiny_model(pad_token_id=PAD, eos_token_id=EOS)
    for mask in (padded("right").ne(PAD), torch.ones_like(REAL)):
        model.run({"input_ids": padded("right"), "attention_mask": mask.long()})
        model.run(Batch.of_ids(padded("right"), mask.bool()))
    for ends in (PAD, [EOS, PAD]):
        tiny_model(pad_token_id=PAD, eos_token_id=ends).run(padded("right"))
    tiny_model(pad_token_id=PAD, eos_token_id=EOS, bos_token_id=PAD).run(padded("left"))
    tiny_model(pad_token_id=None, eos_token_id=EOS).run(padded("left"))
    assert not caplog.records
