"""A folding model (ESMFold2), whose atoms nothing can make up: it opens on an example, its atoms' blocks by name."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.esmfold2.modeling_esmfold2 import EsmFold2AtomInputs

import interp
from benchmarks import proteins
from benchmarks.tiny_configs import build
from interp import Edit, Model
from interp.errors import BadInput, Refused

N_ATOMS, WINDOW = proteins.N_TOKENS * proteins.ATOMS_EACH, 8
STACK = "input_embedder.atom_encoder.layers"
ROUNDING = 1e-5
"""float32, two blocks deep."""


@cache
def folder() -> nn.Module:
    atoms = {
        "hidden_size": 32,
        "output_dim": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_spatial_rope_pairs_per_axis": 1,
        "num_uid_rope_pairs": 4,
    }
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    denoiser = {
        **small,
        "hidden_size": 32,
        "fourier_dim": 16,
        "pair_intermediate_size": 32,
        "atom_encoder": {**atoms, "output_dim": 32},
    }
    config = transformers.EsmFold2Config(
        hidden_size=32,
        pairwise_hidden_size=16,
        single_inputs_size=16 + 2 * 33 + 1,
        atom_encoder=atoms,
        pair_transition_intermediate_size=32,
        folding_trunk_num_hidden_layers=1,
        parcae_num_coda_layers=1,
        num_loops=1,
        sliding_window=WINDOW,
        structure_head={"diffusion_module": denoiser},
        confidence_head={"num_hidden_layers": 1},
        msa_encoder={**small, "hidden_size": 16, "outer_hidden_size": 8, "head_dim": 8},
        lm_encoder={"num_hidden_layers": 1},
        esmc_config=transformers.EsmcConfig(hidden_size=32, **small).to_dict(),
    )
    module = build(transformers.EsmFold2Model, config)
    assert sum(parameter.numel() for parameter in module.parameters()) < 300_000
    return module


def protein(seed: int) -> dict[str, Any]:
    return proteins.protein(EsmFold2AtomInputs, seed)


@cache
def atoms_of() -> Model:
    return interp.load(folder(), example=protein(0), stack=STACK)


def plain(given: dict[str, Any]) -> Tensor:
    """What the model returns first; it draws a dropout in every forward."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return folder()(**given).distogram_logits


def off(got: Tensor | None, wanted: Tensor) -> float:
    assert got is not None and got.shape == wanted.shape
    return float((got - wanted).detach().abs().max() / wanted.abs().max())


def test_without_an_example_it_is_refused_with_what_to_do() -> None:
    with pytest.raises(
        Refused, match=r"give an example in Python.*a part that is a model of its own: esmc$"
    ):
        interp.load(folder())
    with pytest.raises(Refused, match=rf"2 stacks of attention blocks \({STACK}, esmc.layers\)"):
        interp.load(folder(), example=protein(0))


def test_attention_between_atoms_is_seen_and_edited_where_the_whole_runs() -> None:
    model, given = atoms_of(), protein(1)
    run = model.run(given, capture=["pattern", "z", "attn_out", "resid_post"])
    assert off(run.logits, plain(given)) < ROUNDING
    pattern = run.cache["pattern"]
    assert pattern.shape == (2, 2, 2, N_ATOMS, N_ATOMS)
    far = (torch.arange(N_ATOMS)[:, None] - torch.arange(N_ATOMS)).abs() > WINDOW // 2
    assert not pattern[..., far].any() and bool((pattern[..., ~far] > 0).all())
    torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
    same = [Edit.apply(site, lambda x, seen: x) for site in ("pattern", "z", "attn_out")]
    assert off(model.run(given, edits=same).logits, plain(given)) < ROUNDING
    without = model.run(given, edits=[Edit.zero("z", heads=[(1, 0)])]).logits
    assert off(without, plain(given)) > 100 * ROUNDING


def test_what_is_written_is_gated_atom_by_atom() -> None:
    """attn_write = gate · attn_out, where the gate is the third of six chunks of the conditioning's linear layer."""
    model = atoms_of()
    assert not set(model.spec.refused) - model.spec.absent
    given = protein(1)
    run = model.run(
        given, capture=["attn_out", "attn_write", "resid_pre", "resid_mid", "mlp_write"]
    )
    blocks = folder().get_submodule(STACK)
    atoms = run.cache["resid_pre.0"]  # what is embedded of the atoms conditions every block
    for layer, block in enumerate(blocks):
        with torch.no_grad():
            gate = block.adaln_linear(nn.functional.silu(atoms)).chunk(6, dim=-1)[2]
        write = run.cache[f"attn_write.{layer}"]
        assert off(write, gate * run.cache[f"attn_out.{layer}"]) < ROUNDING
        assert (
            off(run.cache[f"resid_mid.{layer}"], run.cache[f"resid_pre.{layer}"] + write) < ROUNDING
        )
    without = [Edit.zero("attn_write.1"), Edit.zero("mlp_write.1")]
    ended = model.run(given, edits=without, capture=["resid_pre", "resid_post"]).cache
    assert off(ended["resid_post.1"], ended["resid_pre.1"]) < ROUNDING


def test_a_required_mask_is_given_in_the_type_that_it_came_in() -> None:
    """The model takes a mask of booleans for an index, and whole numbers for another one."""
    given = protein(2)
    whole = {**given, "attention_mask": given["attention_mask"].long()}
    assert off(atoms_of().run(given).logits, plain(given)) < ROUNDING
    assert off(atoms_of().run(whole).logits, plain(whole)) < ROUNDING
    assert off(plain(whole), plain(given)) > 100 * ROUNDING
    given["attention_mask"][1, 4:] = False
    assert off(atoms_of().run(given).logits, plain(given)) < ROUNDING


def test_the_denoiser_is_not_called_by_the_forward_and_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match=r"no stack|is not called"):
        interp.load(folder(), example=protein(0), stack="structure_head.token_transformer.layers")
