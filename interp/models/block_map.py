"""Addresses inside one block: its attention, what it writes to the residual stream, and how it reads it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from interp.models.gate import Gate
from interp.models.layout import PLAIN, Windows
from interp.models.placed import Placed
from interp.models.pooling import Pooling
from interp.sites import CROSSES


@dataclass(frozen=True)
class Write:
    """What a block adds to the residual stream: `scale` times the output of `module`.

    `gain` names a parameter [d_model] that multiplies it besides (a layer scale), if there is one.
    `channels` [d_model] are numbers that multiply it besides and are no parameter of the block, fitted to
    the probe (a gate computed of a parameter): they hold for the weights that were probed.
    `pooling`: what makes fewer positions of it before it is written, in a block that returns fewer than it reads.
    `gate`: what multiplies it besides and is computed in every run, before `module` returns.
    """

    module: str
    scale: float = 1.0
    gain: str | None = None
    pooling: Pooling | None = None
    gate: Gate | None = None
    channels: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def plain(self) -> bool:
        """Whether it is the module's output times `scale` and no more."""
        return all(x is None for x in (self.gain, self.channels, self.pooling, self.gate))

    def factor(self, model: nn.Module) -> float | Tensor:
        """What the module's output is multiplied with in every run: a number, or one a channel [d_model]."""
        if self.channels is not None:
            return self.scale * self.channels
        if self.gain is None:
            return self.scale
        return self.scale * model.get_parameter(self.gain).reshape(-1)


@dataclass(frozen=True, eq=False)
class Carry:
    """How a block rescales the stream before adding to it: x becomes `factor` · x + `shift`.

    Each is a number or one a channel [d_model], fitted to the probe.
    """

    factor: float | Tensor = 1.0
    shift: Tensor | None = None

    @property
    def nothing(self) -> bool:
        """Whether nothing goes on of the stream."""
        return isinstance(self.factor, float) and self.factor == 0 and self.shift is None

    def __call__(self, x: Tensor) -> Tensor:
        """What goes on of x [... d_model]."""
        factor = self.factor.to(x) if isinstance(self.factor, Tensor) else self.factor
        return x * factor if self.shift is None else x * factor + self.shift.to(x)


@dataclass(frozen=True)
class Source:
    """Activations that are columns of a linear layer's output: `out[..., columns]`.

    `columns` is [heads, d_head]; `input` names what the layer reads: "resid_pre", or the module
    (a norm) whose output it reads.
    """

    module: str
    columns: Tensor
    input: str


@dataclass(frozen=True)
class CrossAttention:
    """A block's attention over another sequence (the source): where it is, and what it writes.

    `out`: the module that returns its output, W_O in most models; `W_O` is None where something stands
    between z and it. `reads`: where it stands before the block, not inside, the argument in which its call has
    the stream; the block then reads `carry` times that plus `write`.
    """

    attention: str
    n_heads: int
    n_kv_heads: int
    d_head: int
    W_O: str | None
    out: str | None
    write: Write | None = None
    reads: int | str | None = None
    carry: float = 1.0


@dataclass(frozen=True)
class Aside:
    """An attention call that writes to another stream that its block returns besides: the `number`-th, counted from
    0, that the module `attention` makes in the block."""

    attention: str
    number: int = 0


@dataclass(frozen=True)
class Normed:
    """A norm that a block goes on with, and what it has added to the stream since the norm before it."""

    norm: str
    writes: tuple[Write, ...]


@dataclass(frozen=True)
class Member:
    """One of the modules that a layer is made of; `in_tuple`: whether it returns a tuple."""

    name: str
    in_tuple: bool = False


@dataclass(frozen=True)
class BlockMap:
    """Addresses inside one block; None where the block has no such thing or it was not found.

    A block computes `resid_mid = norm_mid(resid_pre + before_mid)` and `resid_post = norm_post(resid_mid
    + the rest)`, where the norms are the identity if None (BERT has both, most models neither), and
    `before_mid` are the writes made before the MLP reads, or before attention does where an MLP writes first (in a
    block that pools the stream, before it does); of several MLPs that read what attention returns and are all that
    is written, the first one's. Writes are attn_write, mlp_write and `others`:
    a state-space layer or a convolution, a second attention, what comes besides an MLP. A block that
    attends to sources (`crosses`, first called first) writes what each attention returns, before the MLP reads.
    Where it normalises what it has added before it adds more, the norms before norm_mid are `firsts` (attention's,
    before it attends to a source; the first of them is of `carry_first(resid_pre)`, nothing where attention's output
    replaces the stream), those behind it `lates` (the MLP's, before an adapter).

    Some blocks rescale the stream before they add to it, or carry a norm of it on instead of it:
    `resid_mid = norm_mid(carry_mid(norm_pre(resid_pre)) + before_mid)` and `resid_post =
    norm_post(carry_post(resid_mid) + the rest)`; in a block that writes once `carry_post` is of resid_pre.

    `parallel`: attention and MLP read the same input. `direct`: the attention output is written as
    it is (times `attn_write.scale`), with no norm in between. `attn_out`: the module that returns the
    attention output in order [batch pos d_model], W_O itself in most models. `between`: what stands
    between z and W_O, "" where W_O reads z: "gate" (elementwise, not depending on z) or "function".
    `convolved`: a convolution of each channel that attention's or the MLP's output passes before it is
    written, if there is one. `mixed`: modules whose outputs a block with several residual streams mixes
    into them, with weights that depend on the token; it has no writes then. `attends`: where a layer attends
    several times, the module of each call in order; `along` then says whether their heads lie side by side
    ("n_heads"; each call has an output of its own) or the parts of their heads ("d_head"). `placed`: of inputs in
    several parts, which part attends to which in each of these calls. `asides`: attention calls that write to
    another stream that the block returns besides; their heads are at no site. `W_out`: the one
    linear layer that makes mlp_out from the neurons (`d_mlp` of them). `d_model`: width of the residual stream
    that the block reads. `starts_stage`: it is of another width or length than the block before read. `ends_stage`:
    the block itself returns what is of the width and length that the next one reads, and is not what it reads.
    `repeated`: modules called several times, of which the call on the stream is meant; of W_O inside attention, which
    reads z a few positions at a time, all calls are.
    `turned`: modules that return [batch channels pos]. `reshapes_behind`: where a block pools the stream on its
    way, the module that reads `resid_mid` before; the writes known are those up to there.
    `windows`: where positions are cut into windows, each of which attends to itself. `axes`: those of the stream.
    `members`: the modules of a layer that is no module (they are called one after the other), `name` the first.
    `adds`: what the block returns is what code outside adds to the stream that it read; `resid_post` is the sum.
    """

    name: str
    d_model: int = 0
    axes: tuple[str, ...] = PLAIN
    starts_stage: bool = False
    ends_stage: bool = False
    windows: Windows | None = None
    attention: str | None = None
    attends: tuple[str, ...] = ()
    along: str = ""
    placed: tuple[Placed, ...] = ()
    asides: tuple[Aside, ...] = ()
    n_heads: int = 0
    n_kv_heads: int = 0
    d_head: int = 0
    W_O: str | None = None
    attn_out: str | None = None
    between: str = ""
    v: Source | None = None
    attn_write: Write | None = None
    W_out: str | None = None
    d_mlp: int = 0
    mlp_out: str | None = None
    mlp_write: Write | None = None
    crosses: tuple[CrossAttention, ...] = ()
    others: tuple[Write, ...] = ()
    firsts: tuple[Normed, ...] = ()
    carry_first: Carry | None = None
    before_mid: tuple[Write, ...] = ()
    norm_mid: str | None = None
    lates: tuple[Normed, ...] = ()
    norm_post: str | None = None
    norm_pre: str | None = None
    carry_mid: Carry | None = None
    carry_post: Carry | None = None
    convolved: str | None = None
    repeated: frozenset[str] = frozenset()
    turned: frozenset[str] = frozenset()
    reshapes_behind: str | None = None
    mixed: tuple[str, ...] = ()
    parallel: bool = False
    direct: bool = False
    members: tuple[Member, ...] = ()
    adds: bool = False

    @property
    def returns(self) -> str:
        """The module that returns resid_post: the block itself, in most models."""
        return self.members[-1].name if self.members else self.name

    @property
    def writes(self) -> tuple[Write, ...]:
        """Everything the block adds to the residual stream."""
        crosses = [] if self.ahead else [cross.write for cross in self.crosses]
        main = (self.attn_write, *crosses, self.mlp_write)
        return tuple(write for write in main if write is not None) + self.others

    @property
    def cross(self) -> CrossAttention | None:
        """The attention to a source, of several the first."""
        return self.to_source(0)

    @property
    def sources(self) -> list[tuple[str, CrossAttention]]:
        """Its attentions to sources, each with the prefix of its sites."""
        return list(zip(CROSSES, self.crosses, strict=False))

    def to_source(self, number: int) -> CrossAttention | None:
        """The attention to one of its sources, counted from 0; None where it attends to fewer."""
        return self.crosses[number] if number < len(self.crosses) else None

    @property
    def ahead(self) -> bool:
        """Whether the attention to a source stands before the block, and writes before resid_pre."""
        return self.cross is not None and self.cross.reads is not None

    @property
    def rescales(self) -> bool:
        """Whether what goes on of the stream is not the stream itself, even before a norm of the sum."""
        carries = (self.carry_first, self.carry_mid, self.carry_post)
        return any(x is not None for x in (self.norm_pre, *carries))
