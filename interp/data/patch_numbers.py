"""Whose patch a position holds, of models that read the patches of all images in one row with a grid beside them.

Some of them put positions into another order (Qwen2.5-VL that of its windows), or cut what they are given further.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.errors import Refused
from interp.models.grids import MOVED, taken_as
from interp.models.model import Model
from interp.run.batch import Batch


@torch.no_grad()
def patch_numbers(
    model: Model, data: Batch | Mapping[str, Tensor], *, seed: int = 0
) -> Int[Tensor, "batch pos"]:
    """The number of the patch that each position holds, where a model reads patches with a grid beside them.

    Patches are counted from 0 in every image, in the order in which the input has them: where on the picture
    one lies, its processor knows. Positions may have another order (Qwen2.5-VL's that of its windows); -1
    where one holds no patch; the same number at several where the model cuts what it is given further. Found by
    changing the patches whose number has a bit, for every bit, and then all others: a position moves with one of
    both each time, and all numbers of an image are there equally often.

    Args:
        data: what model.run takes. seed: of what the patches are changed to.

    Raises:
        Refused: the model reads no patches with a grid, or positions of its first block hold several.
    """
    patches = taken_as(model.module)
    if patches is None:
        raise Refused(
            f"{model.id} takes no patches of several images in one row with a grid beside them: "
            "interp.data.images.patch_grid tells the positions of a model that takes whole images"
        )
    batch = model.as_batch(data)
    x, axis = batch.inputs[patches.name], patches.axis
    n = x.shape[axis] // (patches.entries * batch.size)
    generator = torch.Generator().manual_seed(seed)
    other = torch.randn(x.shape, generator=generator).to(x) * float(x.float().std().clamp_min(1))

    def resid(changed: Tensor) -> Tensor:
        where = changed.repeat_interleave(patches.entries).repeat(batch.size).to(x.device)
        where = where.view(-1, *[1] * (x.ndim - axis - 1))
        mixed = replace(batch, inputs={**batch.inputs, patches.name: torch.where(where, other, x)})
        found = model.run(mixed, capture=["resid_pre.0"], stop_at=0, logits=False)
        return found.cache["resid_pre.0"].float()

    numbers = torch.arange(n)
    plain = resid(torch.zeros(n, dtype=torch.bool))
    allowed = MOVED * float(plain.abs().max())

    def moved(changed: Tensor) -> Bool[Tensor, "batch pos"]:
        return (resid(changed) - plain).abs().amax(-1).cpu() > allowed

    anything = moved(torch.ones(n, dtype=torch.bool))
    found = torch.zeros(plain.shape[:2], dtype=torch.long)
    apart = True
    for bit in range((n - 1).bit_length()):
        has = (numbers >> bit) % 2 == 1
        with_bit, without = moved(has), moved(~has)
        apart &= torch.equal(with_bit ^ without, anything)
        found += with_bit * 2**bit
    found[~anything] = -1
    times = torch.stack([torch.bincount(row[row >= 0], minlength=n) for row in found])
    if not apart or int(times.min()) == 0 or int(times.min()) != int(times.max()):
        raise Refused(
            f"positions of {model.id} do not hold one each of the {n} patches of an image: these overlap, are "
            "merged or left out on the way to the first block"
        )
    return found
