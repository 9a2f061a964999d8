"""An example of what a folding model takes: residues in a row, and the atoms that they are made of.

Such a model is known by what its forward takes: among its required inputs is a dataclass that says which token
each atom belongs to.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from interp.models.calls import required_inputs

N_TOKENS, ATOMS_EACH = 6, 3


def example_of(module: nn.Module) -> dict[str, Any] | None:
    """Inputs by name, two random proteins; None where the forward takes no atoms."""
    kinds = inspect.get_annotations(inspect.unwrap(type(module).forward), eval_str=True)
    kind = next(
        (kinds[name] for name in required_inputs(module) if _of_atoms(kinds.get(name))), None
    )
    return None if kind is None else protein(kind, seed=0)


def _of_atoms(kind: Any) -> bool:
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return any(field.name == "atom_to_token" for field in fields)


def protein(kind: Any, seed: int) -> dict[str, Any]:
    """Two chains of six residues of three atoms each; `kind` is the dataclass of their atoms."""
    generator = torch.Generator().manual_seed(seed)
    n_atoms = N_TOKENS * ATOMS_EACH
    place = torch.arange(N_TOKENS).expand(2, -1)
    token = torch.arange(n_atoms).div(ATOMS_EACH, rounding_mode="floor").expand(2, -1)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    atoms = kind(
        ref_pos=torch.randn(2, n_atoms, 3, generator=generator),
        ref_charge=torch.zeros(2, n_atoms),
        atom_attention_mask=torch.ones(2, n_atoms, dtype=torch.bool),
        ref_element=whole(1, 20, 2, n_atoms),
        ref_atom_name_chars=whole(0, 60, 2, n_atoms, 4),
        ref_space_uid=token,
        atom_to_token=token,
    )
    zeros = dict.fromkeys(("asym_id", "sym_id", "entity_id", "mol_type"), 0 * place)
    return {
        **zeros,
        "token_index": place,
        "residue_index": place,
        "res_type": whole(2, 20, 2, N_TOKENS),
        "token_bonds": torch.zeros(2, N_TOKENS, N_TOKENS, 1),
        "attention_mask": torch.ones(2, N_TOKENS, dtype=torch.bool),
        "atom_inputs": atoms,
        "input_ids": whole(4, 20, 2, N_TOKENS),
    }
