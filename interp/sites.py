"""Sites: the named places of a transformer where an activation can be read or edited.

A site is written `name`, `name.layer` or `name.layer.head`: `resid_post`, `resid_post.5`, `z.5.1`.
TransformerLens names (`blocks.5.attn.hook_z`) are accepted and mean the same place. In the decoder of an
encoder-decoder the sites are those of the decoder's stack; its second attention, whose keys and values
are made from the encoder's output (the source), has the sites `cross_…`. A block that attends to two
sources, one after the other, has them at `cross_…` and `cross2_…`. Where a decoder attends to both in
one softmax there is one attention: its keys (in `scores`, `pattern`, `k`, `v`) are the target's positions,
and after them the source's.
Where the attention to a source stands between blocks, its sites are of the block behind it,
and come before that block's `resid_pre`.
"""

from __future__ import annotations

import difflib
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
    "cross_q": HEAD_AXES,
    "cross_k": ("batch", "source_pos", "n_kv_heads", "d_head"),
    "cross_v": ("batch", "source_pos", "n_kv_heads", "d_head"),
    "cross_z": HEAD_AXES,
    "cross_scores": ("batch", "n_heads", "query_pos", "source_pos"),
    "cross_pattern": ("batch", "n_heads", "query_pos", "source_pos"),
    "cross_out": RESIDUAL_AXES,
    "cross_write": RESIDUAL_AXES,
    "cross2_q": HEAD_AXES,
    "cross2_k": ("batch", "source_pos", "n_kv_heads", "d_head"),
    "cross2_v": ("batch", "source_pos", "n_kv_heads", "d_head"),
    "cross2_z": HEAD_AXES,
    "cross2_scores": ("batch", "n_heads", "query_pos", "source_pos"),
    "cross2_pattern": ("batch", "n_heads", "query_pos", "source_pos"),
    "cross2_out": RESIDUAL_AXES,
    "cross2_write": RESIDUAL_AXES,
}
"""Axes of every site, one layer at a time. `attn_out` is what W_O returns, `attn_write` what enters
the residual stream (they differ where a model normalises after attention); likewise for the MLP.
`mlp_post` are the neurons: what the linear layer that makes `mlp_out` reads.
Of a model with several residual streams `embed` and `resid_*` have all of them, one after the other. The
positions of an image held in rows and columns are its rows, one after the other. Keys that are no
position's (several positions compressed to one, padding of windows) come behind those of the positions;
where all keys are made of several positions each, there are so many fewer, and so it is with queries
and z. Where a layer attends within windows, its sites have the positions of the stream all the same:
between windows patterns are 0 and scores -inf, and an edit that puts something else there is refused."""

SELF_SITES = ("q", "k", "v", "scores", "pattern", "z")
CROSSES = ("cross_", "cross2_")
"""Prefixes of the sites of attentions whose keys and values are made from another sequence: of a block's first
one, and of the one that attends to a second source."""
CROSS_SITES = tuple(name for name in AXES if name.startswith(CROSSES))
ATTENTION_SITES = SELF_SITES + tuple(cross + name for cross in CROSSES for name in SELF_SITES)
MODULE_SITES = tuple(name for name in AXES if name not in ATTENTION_SITES)

TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_in": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_out": "resid_post",
    "hook_attn_out": "attn_write",
    "attn.hook_out": "attn_out",
    "attn.o.hook_out": "attn_out",
    "hook_mlp_out": "mlp_write",
    "mlp.hook_out": "mlp_out",
    "mlp.out.hook_out": "mlp_out",
    "mlp.hook_post": "mlp_post",
    "mlp.out.hook_in": "mlp_post",
    "attn.hook_rot_q": "q",
    "attn.hook_rot_k": "k",
    "attn.hook_v": "v",
    "attn.v.hook_out": "v",
    "attn.hook_z": "z",
    "attn.o.hook_in": "z",
    "attn.hook_attn_scores": "scores",
    "attn.hook_pattern": "pattern",
    "cross_attn.hook_q": "cross_q",
    "cross_attn.hook_k": "cross_k",
    "cross_attn.hook_v": "cross_v",
    "cross_attn.hook_z": "cross_z",
    "cross_attn.hook_attn_scores": "cross_scores",
    "cross_attn.hook_pattern": "cross_pattern",
    "cross_attn.hook_out": "cross_out",
    "hook_cross_attn_out": "cross_write",
}
"""What TransformerLens calls our sites inside a block: the classic names, and those of its bridge.

Two of its names say different things: `hook_attn_out` is what enters the residual stream (our
`attn_write`, after a norm or multiplier that stands behind attention), `attn.hook_out` what the
attention module returns (our `attn_out`); likewise `hook_mlp_out` and `mlp.hook_out`. `hook_embed`
is our `embed`, the input of the first block; where a model has learned positions, ours includes them
and theirs does not."""

_BEFORE_ROTARY = (
    "is read before rotary positions are applied; sites q and k are read after it: ask for "
    "'{place}attn.hook_rot_{last}' (which models without rotary positions have too)"
)
_INPUTS = "is a copy of what the block reads: ask for '{place}hook_resid_pre'"
_SCALE = "is no site; cache.to_transformer_lens(model) works it out from '{place}%s': ask for that"
_NORMED = (
    "is no site; it is '{place}%s' (less its mean, in a LayerNorm) over the scale, which "
    "cache.to_transformer_lens(model) works out from it: ask for '{place}%s'"
)
_NO_COUNTERPART = {
    "attn.hook_q": _BEFORE_ROTARY,
    "attn.hook_k": _BEFORE_ROTARY,
    "attn.q.hook_out": _BEFORE_ROTARY,
    "attn.k.hook_out": _BEFORE_ROTARY,
    "attn.hook_result": "is z times W_O: ask for '{place}attn.hook_z', multiply by model.W_O(layer)",
    "hook_attn_in": _INPUTS,
    "hook_q_input": _INPUTS,
    "hook_k_input": _INPUTS,
    "hook_v_input": _INPUTS,
    "hook_mlp_in": "is a copy of what the MLP reads: ask for '{place}hook_resid_mid'",
    "mlp.hook_pre": "comes before the activation function: ask for '{place}mlp.hook_post'",
    "mlp.hook_pre_linear": "comes before the gate: ask for '{place}mlp.hook_post'",
    "ln1.hook_scale": _SCALE % "hook_resid_pre",
    "ln2.hook_scale": _SCALE % "hook_resid_mid",
    "ln1.hook_normalized": _NORMED % ("hook_resid_pre", "hook_resid_pre"),
    "ln2.hook_normalized": _NORMED % ("hook_resid_mid", "hook_resid_mid"),
    "hook_pos_embed": "is no site; positions are part of 'embed', the input of the first block",
    "pos_embed.hook_out": "is no site; positions are part of 'embed', the input of the first block",
    "embed.hook_in": "are the token ids: model.tokenize(text).ids",
    "hook_unembed": "are the logits: read run.logits",
    "unembed.hook_out": "are the logits: read run.logits",
    "ln_final.hook_scale": "is no site; cache.to_transformer_lens(model) works it out from "
    "'hook_resid_post', whose last layer the norm reads: ask for that",
    "ln_final.hook_normalized": "is no site; ask for 'hook_resid_post', whose last layer the norm reads",
    "ln_final.hook_in": "is 'hook_resid_post' of the last layer",
    "ln_final.hook_out": "is no site; ask for 'hook_resid_post', whose last layer the norm reads",
    "unembed.hook_in": "is no site; ask for 'hook_resid_post', whose last layer the final norm reads",
}
"""TransformerLens names that are no site here, and where to look instead."""
_INSIDE = re.compile(
    r"(ln\w*|attn|attn\.[qkv]|mlp|mlp\.(in|gate)|rotary_emb|pos_embed)"
    r"\.hook_(in|out|scale|normalized|hidden_states|cos|sin)"
)
"""Names of the bridge for what norms and projections inside a block read and return."""


_ELSEWHERE = {
    "logits": "every run has them: run.logits",
    "hidden_states": "they are 'resid_pre' (what each block reads) and 'resid_post' (what it returns)",
    "all": "name what is wanted, each a site of every layer: 'resid_post', 'attn_write', 'mlp_write', 'z', 'pattern'",
}
"""Words that are no site, and what to write instead."""


@dataclass(frozen=True)
class Site:
    """A place in the model: all layers, one layer, or one head of one layer.

    >>> Site.parse("z.5.1")
    Site(name='z', layer=5, head=1)
    >>> Site.parse("blocks.3.hook_resid_pre"), Site.parse("attn.hook_pattern")
    (Site(name='resid_pre', layer=3, head=None), Site(name='pattern', layer=None, head=None))
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
        if not isinstance(text, str):
            written = ".".join(map(str, text)) if isinstance(text, tuple) else "z.5"
            raise BadInput(f"{text!r} is no site; a site is a text: '{written}'")
        if text in _ELSEWHERE:
            raise BadInput(f"no site '{text}'; {_ELSEWHERE[text]}")
        if "hook_" in text or text.startswith("blocks."):
            return _from_transformer_lens(text)
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


def _from_transformer_lens(text: str) -> Site:
    """The site that TransformerLens calls `text`; without `blocks.N.`, that of every layer."""
    if text in ("hook_embed", "embed.hook_out"):
        return Site("embed")
    inside = re.fullmatch(r"(?:blocks|decoder)\.(\d+)\.(.+)", text)
    place, hook = (f"blocks.{inside[1]}.", inside[2]) if inside else ("", text)
    if text.startswith("encoder."):
        raise BadInput(
            f"'{text}' is of the encoder: open it on its own, interp.load(model.module.get_encoder())"
        )
    if text.startswith("decoder.") and hook == "hook_resid_mid":
        raise BadInput(
            f"'{text}' lies before cross-attention and is no site; resid_mid, which the MLP reads, is "
            f"'{text}_cross'"
        )
    if hook == "hook_resid_mid_cross":
        return Site("resid_mid", int(inside[1]) if inside else None)
    if hook in TRANSFORMER_LENS:
        return Site(TRANSFORMER_LENS[hook], int(inside[1]) if inside else None)
    hook = f"attn.{hook}" if f"attn.{hook}" in _NO_COUNTERPART else hook
    if hook in _NO_COUNTERPART:
        last = "k" if ".k." in hook or hook.endswith("k") else "q"
        reason = _NO_COUNTERPART[hook].format(place=place, last=last)
        raise BadInput(f"'{text}' {reason}")
    if inner := [name for name in TRANSFORMER_LENS if name.endswith(f".{hook}")]:
        every = "" if place else f", or '{TRANSFORMER_LENS[inner[0]]}' for all layers"
        raise BadInput(f"no site '{text}'; write '{place or 'blocks.0.'}{inner[0]}'{every}")
    if _INSIDE.fullmatch(hook):
        raise BadInput(
            f"'{text}' is no site: what norms, projections and tables of positions read and return is "
            f"not kept; ask for what stands around it, such as '{place}hook_resid_pre', "
            f"'{place}hook_resid_mid', '{place}mlp.hook_post', or put a forward hook of your own on the "
            "module in model.module"
        )
    raise BadInput(f"no site '{text}'; {_nearest(text)}")


def _nearest(text: str) -> str:
    """What to write for a name that is nearly one of TransformerLens'."""
    if re.match(r"(blocks|decoder)\.-\d", text):
        return "layers are counted from 0, and a site without a number is that of all layers"
    layer = re.search(r"\d+", text)
    last = text[text.index("hook_") :].split(".")[0] if "hook_" in text else text.split(".")[-1]
    ends = {name.split("hook_")[-1]: name for name in reversed(TRANSFORMER_LENS)}
    ends = {end: name.removeprefix("cross_") for end, name in ends.items()}
    found = difflib.get_close_matches(last.removeprefix("hook_"), ends, n=1)
    meant = f"did you mean 'blocks.{layer[0] if layer else 0}.{ends[found[0]]}'? " if found else ""
    return f"{meant}known, behind 'blocks.5.': {', '.join(TRANSFORMER_LENS)}"


def to_transformer_lens(site: Site) -> list[str]:
    """What TransformerLens calls a site, its classic name first; none where a layer is missing, or for a second source.

    >>> to_transformer_lens(Site("z", 5))
    ['blocks.5.attn.hook_z', 'blocks.5.attn.o.hook_in']
    """
    if site.name == "embed":
        return ["hook_embed"]
    names = [hook for hook, name in TRANSFORMER_LENS.items() if name == site.name]
    return [] if site.layer is None else [f"blocks.{site.layer}.{hook}" for hook in names]


def source_of(name: str) -> tuple[int, str] | None:
    """Of a site of attention to a source, which of the block's sources that is, and the site's name behind the prefix.

    >>> source_of("cross_z"), source_of("cross2_pattern"), source_of("z")
    ((0, 'z'), (1, 'pattern'), None)
    """
    return next(
        ((i, name.removeprefix(of)) for i, of in enumerate(CROSSES) if name.startswith(of)), None
    )


def has_heads(name: str) -> bool:
    """Whether the site called `name` has one slice a head."""
    return name in ATTENTION_SITES


def head_axis(name: str) -> int:
    """The axis of a one-layer tensor of this site along which heads lie.

    >>> head_axis("z"), head_axis("pattern")
    (2, 1)
    """
    return 1 if by_query(name) else 2


def by_query(name: str) -> bool:
    """Whether a site has a number for each query and key: scores and patterns.

    >>> by_query("cross_pattern"), by_query("z")
    (True, False)
    """
    return "query_pos" in AXES[name]


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
