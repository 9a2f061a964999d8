"""An example of what a forward takes that is no tensor: a session of a tracker of objects in videos.

A session is known by what it is made of and by what it can do, not by its name: its class, to which the forward's
signature points, is made of a video, its height and its width. One with text prompts is given one; any other an
object with a mask on the first frame. The frames before the last are run first, so that the last looks back on them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from interp.models.calls import required_inputs

FRAMES = 3
"""Of which the first has a mask or a text, and the second was tracked."""
IDS = 7
"""Token ids of a text, of which two are padding."""


def example_of(module: nn.Module) -> dict[str, Any] | None:
    """Inputs by name on the last frame of a random video; None where the forward takes no session."""
    names = required_inputs(module)
    kinds = inspect.get_annotations(inspect.unwrap(type(module).forward), eval_str=True)
    kind = kinds.get(names[0]) if names else None
    init = getattr(kind, "__init__", None)  # that of a tensor is not written in Python
    made_of = inspect.signature(init).parameters if inspect.isfunction(init) else {}
    if not {"video", "video_height", "video_width"} <= made_of.keys():
        return None
    side = _side(module)
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(FRAMES, 3, side, side, generator=generator)
    session: Any = kind(video=video, video_height=side, video_width=side, dtype=torch.float32)  # type: ignore
    if hasattr(session, "add_prompt"):
        number = session.add_prompt("a text")
        session.prompt_input_ids[number] = torch.randint(10, 90, (1, IDS), generator=generator)
        session.prompt_attention_masks[number] = (torch.arange(IDS) < IDS - 2).long()[None]
    else:
        mask = torch.zeros(1, 1, side, side)
        mask[..., side // 4 : side // 2, side // 4 : side // 2] = 1
        session.add_mask_inputs(session.obj_id_to_idx(1), 0, mask)
        session.obj_with_new_inputs.append(1)
    frame = next(name for name in kinds if name.startswith("frame_"))
    with torch.no_grad():
        for number in range(FRAMES - 1):
            module(**{names[0]: session, frame: number})
    return {names[0]: session, frame: FRAMES - 1}


def _side(module: nn.Module) -> int:
    """The side of a model's images: its own, or that of a part."""
    configs = (getattr(part, "config", None) for part in module.modules())
    sides = (getattr(config, "image_size", None) for config in configs)
    side: Any = next(side for side in sides if side)
    return side if isinstance(side, int) else side[0]
