"""Sites: the named places of a transformer where an activation can be read or edited.

A site is written `name`, `name.layer` or `name.layer.head`: `resid_post`, `resid_post.5`, `z.5.1`.
TransformerLens names (`blocks.5.attn.hook_z`) are accepted and mean the same place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from interp.errors import BadInput, unknown

RESIDUAL_AXES = ("batch", "pos", "d_model")
HEAD_AXES = ("batch", "pos", "n_heads", "d_head")
PATTERN_AXES = ("batch", "n_heads", "query_pos", "key_pos")

AXES: dict[str, tuple[str, ...]] = {
    "embed": RESIDUAL_AXES,
    "resid_pre": RESIDUAL_AXES,
    "resid_mid": RESIDUAL_AXES,
    "resid_post": RESIDUAL_AXES,
    "attn_out": RESIDUAL_AXES,
    "attn_write": RESIDUAL_AXES,
    "mlp_post": ("batch", "pos", "d_mlp"),
    "mlp_out": RESIDUAL_AXES,
    "mlp_write": RESIDUAL_AXES,
    "q": HEAD_AXES,
    "k": ("batch", "pos", "n_kv_heads", "d_head"),
    "v": ("batch", "pos", "n_kv_heads", "d_head"),
    "z": HEAD_AXES,
    "scores": PATTERN_AXES,
    "pattern": PATTERN_AXES,
}
"""Axes of every site, one layer at a time. `attn_out` is what W_O returns, `attn_write` what enters
the residual stream (they differ where a model normalises after attention); likewise for the MLP.
`mlp_post` are the neurons: what the linear layer that makes `mlp_out` reads."""

ATTENTION_SITES = ("q", "k", "v", "scores", "pattern", "z")
MODULE_SITES = tuple(name for name in AXES if name not in ATTENTION_SITES)

_TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_write",
    "hook_mlp_out": "mlp_write",
    "mlp.hook_post": "mlp_post",
    "attn.hook_rot_q": "q",
    "attn.hook_rot_k": "k",
    "attn.hook_v": "v",
    "attn.hook_z": "z",
    "attn.hook_attn_scores": "scores",
    "attn.hook_pattern": "pattern",
}


@dataclass(frozen=True)
class Site:
    """A place in the model: all layers, one layer, or one head of one layer.

    >>> Site.parse("z.5.1")
    Site(name='z', layer=5, head=1)
    >>> Site.parse("blocks.3.hook_resid_pre")
    Site(name='resid_pre', layer=3, head=None)
    >>> str(Site("resid_post", 5)), Site("z").axes
    ('resid_post.5', ('batch', 'pos', 'n_heads', 'd_head'))
    """

    name: str
    layer: int | None = None
    head: int | None = None

    @staticmethod
    def parse(text: str | Site) -> Site:
        """The site that `text` names; a BadInput with the nearest name where there is none."""
        if isinstance(text, Site):
            return text
        if text == "hook_embed":
            return Site("embed")
        if lens := re.fullmatch(r"blocks\.(\d+)\.(.+)", text):
            layer, hook = lens.groups()
            if hook in ("attn.hook_q", "attn.hook_k"):
                raise BadInput(
                    f"'{text}' is read before rotary positions are applied; sites q and k are read "
                    f"after it: ask for 'blocks.{layer}.attn.hook_rot_{hook[-1]}'"
                )
            if hook not in _TRANSFORMER_LENS:
                raise unknown("TransformerLens site", hook, _TRANSFORMER_LENS)
            return Site(_TRANSFORMER_LENS[hook], int(layer))
        name, *numbers = text.split(".")
        if name not in AXES:
            raise unknown("site", name, AXES)
        if len(numbers) > 2 or not all(number.isdigit() for number in numbers):
            raise BadInput(f"'{text}' is not a site; write '{name}', '{name}.5' or '{name}.5.1'")
        layer, head = (*map(int, numbers), None, None)[:2]
        if head is not None and not has_heads(name):
            raise BadInput(f"site '{name}' has no heads; write '{name}.{layer}'")
        return Site(name, layer, head)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of this site's axes at one layer."""
        return AXES[self.name]

    def __str__(self) -> str:
        return ".".join(
            str(part) for part in (self.name, self.layer, self.head) if part is not None
        )


def has_heads(name: str) -> bool:
    """Whether the site called `name` has one slice a head."""
    return name in ATTENTION_SITES


def head_axis(name: str) -> int:
    """The axis of a one-layer tensor of this site along which heads lie.

    >>> head_axis("z"), head_axis("pattern")
    (2, 1)
    """
    return 1 if name in ("scores", "pattern") else 2


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers as ranges.

    >>> ranges([0, 1, 2, 7])
    '0–2, 7'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in runs) or "none"
