"""Identities that vouch for a map: what fails is refused by name, with the size of the error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, starmap
from math import isnan

import torch
from torch import Tensor

from interp.models.mapped import as_mapped
from interp.models.readout import of_tokens, unembed
from interp.models.recording import Recording
from interp.models.relative import relative_error, relative_tolerance
from interp.models.solve import SLACK, off_by, rounding
from interp.models.spec import Check, Spec, module_device
from interp.models.stack import Layer
from interp.models.weights import linear_map
from interp.models.written import added, combined, remade, written
from interp.sites import CROSSES, SELF_SITES, ranges

Check_ = Callable[..., bool]
"""Tries one identity: (name, got, wanted, detail, the sites it vouches for)."""


def verify(
    spec: Spec,
    seen: Recording,
    plain: Tensor,
    between_kernels: float = 0.0,
    of: str = "the model's own",
    ends: Sequence[Tensor] = (),
    shown: Tensor | None = None,
) -> Spec:
    """The map with every identity tried; sites whose identity fails are refused.

    `between_kernels`: how far the model's own attention kernels are from each other on the probe. Ours
    may be twice as far from them. `of`: whose logits `plain` are. `ends`: what the last block returns in a plain
    forward, where that says more than the logits. `shown`: what the model returns under the window, where `plain` is
    to be compared with that of another forward than `seen`.
    """
    checks, refused = [], dict(spec.refused)
    layers = as_mapped(spec, seen)
    # Some models return logits in float32 whatever the stream is in.
    dtypes = (seen.output.dtype, layers[-1].output.dtype)
    dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    relative = relative_tolerance(dtype)

    def check(
        name: str,
        got: Sequence[Tensor],
        wanted: Sequence[Tensor],
        detail: str,
        sites: tuple[str, ...] = (),
        allowed: float = relative,
    ) -> bool:
        errors = starmap(relative_error, _side_by_side(got, wanted))
        error, note = max(errors, key=lambda found: (isnan(found[0]), found[0]))
        return judge(name, error, detail, sites, allowed, note)

    def judge(
        name: str, error: float, detail: str, sites: tuple[str, ...], allowed: float, note: str = ""
    ) -> bool:
        passed = error <= allowed
        checks.append(Check(name, passed, error, allowed, detail, sites))
        for site in sites if not passed else ():
            refused.setdefault(
                site, f"not so on the probe that {detail}: off by {error:.1e} of its size{note}"
            )
        return passed

    if spec.attention_layers:
        check(
            "window",
            [_whole_maps(spec, seen.output if shown is None else shown)],
            [_whole_maps(spec, plain)],
            f"logits under the window equal {of}",
            _attention_sites(spec),
            max(relative, 2 * between_kernels),
        )
    if ends:
        check(
            "stack",
            [
                call.output
                for call in seen.calls[spec.blocks[-1].returns]
                if call.output is not None
            ],
            ends,
            "what the last block returns under the window is what it returns without",
            (*_attention_sites(spec), "resid_post"),
            max(relative, 2 * between_kernels),
        )
    _check_heads(spec, layers, check)
    _check_linear(spec, layers, check)
    linked = True
    if len(layers) > 1:
        links = [
            (a.output, b.hidden(spec.hidden))
            for (a, b), block in zip(pairwise(layers), spec.blocks[1:], strict=True)
            if not block.starts_stage
        ]
        where = "of a stage " if len(spec.stages) > 1 else ""
        linked = not links or check(
            "stream",
            [out for out, _ in links],
            [read for _, read in links],
            f"each block {where}reads what the one before it returned",
        )
    if not linked and (alone := [b.name for b in spec.blocks if b.name == b.attention]):
        why = (
            f"'{alone[0]}' is an attention in a list of its own, no block: what it returns is not the residual "
            "stream, to which code outside adds it (resid_pre is what it reads)"
        )
        refused |= dict.fromkeys(("resid_post", "unembedding"), why)
        spec = replace(spec, absent=spec.absent - {"unembedding"})
    _check_ahead(spec, layers, check)
    proven = _check_writes(spec, layers, linked, check, judge)
    if "attn_write" in spec.absent and not proven and spec.n_streams == 1:
        spec = replace(spec, absent=spec.absent - {"attn_write"})
        refused["attn_write"] = "no sum of what the blocks write was verified"
    if spec.n_streams > 1:
        mixed = [
            combined(layer, spec.hidden, b.mixed)
            for layer, b in zip(layers, spec.blocks, strict=True)
        ]
        check(
            "streams",
            mixed,
            [layer.output for layer in layers],
            "each residual stream is a combination of those the block read and of what it computed",
            ("mlp_out", "mlp_post"),
        )
    if spec.readout or (spec.unembedding is not None and "unembedding" not in refused):
        final = layers[-1].output
        final = final if spec.d_vocab is None else of_tokens(final, seen.output)
        passed = check(
            "unembedding",
            [unembed(spec, seen.module, final)],
            [seen.output],
            "unembedding the final residual gives the logits",
            ("unembedding",),
        )
        if spec.readout and not passed:
            spec = replace(spec, readout=(), absent=spec.absent - {"unembedding"})
    return replace(spec, checks=tuple(checks), refused=refused)


def _sources(spec: Spec) -> tuple[str, ...]:
    """Prefixes of the sites of the sources that blocks attend to."""
    return CROSSES[: max(len(block.crosses) for block in spec.blocks)]


def _attention_sites(spec: Spec) -> tuple[str, ...]:
    return tuple(of + site for of in ("", *_sources(spec)) for site in SELF_SITES)


def _check_heads(spec: Spec, layers: list[Layer], check: Check_) -> None:
    """Head outputs, of the attention and of those to sources, sum to what W_O returns."""
    for name, what, source in (
        ("heads", "the attention output", None),
        ("cross heads", "the output of the attention to a source", 0),
        ("cross2 heads", "the output of the attention to a second source", 1),
    ):
        site = "attn_out" if source is None else f"{CROSSES[source]}out"
        outs, sums = [], []
        for layer, block in zip(layers, spec.blocks, strict=True):
            if source is not None:
                of = block.to_source(source)
                returns = of and of.out
                inside, call = layer.to_sources[source] if of else (layer.inside, None)
            else:
                of, returns = block, block.attn_out
                inside, call = layer.inside, layer.attention
            if of is None or of.W_O is None or (block.between and source is None):
                continue
            assert call is not None
            z = call.tensors["z"]
            W, b = _linear(inside, of.W_O, of.n_heads * of.d_head)
            heads = torch.einsum("bphd,hdm->bpm", z.double(), W.reshape(of.n_heads, of.d_head, -1))
            out = inside.call(returns or of.W_O).output
            assert out is not None
            outs.append(out.reshape(heads.shape))
            sums.append(heads + b)
        if outs:
            check(name, sums, outs, f"head outputs plus bias sum to {what}", (site,))


def _check_linear(spec: Spec, layers: list[Layer], check: Check_) -> None:
    """Linear layers that read something else than z: neurons, and z times a gate."""
    for name, detail, site in (
        ("gated heads", "gated head outputs plus bias sum to the attention output", "attn_out"),
        ("neurons", "neurons times W_out plus bias sum to the MLP's output", "mlp_post"),
    ):
        outs, sums = [], []
        for layer, block in zip(layers, spec.blocks, strict=True):
            gated = site == "attn_out" and block.between != ""
            module = block.W_O if gated else block.W_out if site == "mlp_post" else None
            if module is None:
                continue
            call = layer.inside.call(module)
            assert call.output is not None
            width = block.n_heads * block.d_head if gated else block.d_mlp
            x = call.inputs[0].reshape(-1, width).double()
            W, b = _linear(layer.inside, module, width)
            outs.append(call.output.reshape(len(x), -1))
            sums.append(x @ W + b)
        if outs:
            check(name, sums, outs, detail, (site,))


def _check_ahead(spec: Spec, layers: list[Layer], check: Check_) -> None:
    """What blocks read is made of the stream before and of what the attention between blocks writes."""
    made, read = [], []
    for before, layer, block in zip([None, *layers], layers, spec.blocks, strict=False):
        if layer.ahead is None or block.cross is None or block.cross.reads is None:
            continue
        x = before.output if before else layer.ahead.hidden(block.cross.reads)
        assert block.cross.write is not None
        parts = written(layer.ahead, [block.cross.write], x.shape)
        made.append(block.cross.carry * x.double() + sum(parts))
        read.append(layer.hidden(spec.hidden))
    if made:
        detail = "each block reads a multiple of what the one before it returned plus cross_write"
        check("between blocks", made, read, detail, ("cross_write",))


def _check_writes(
    spec: Spec, layers: list[Layer], linked: bool, check: Check_, judge: Check_
) -> bool:
    """Whether what the blocks write makes the stream: each block's own sum, and all of them at once.

    Of layers whose writes are refused by themselves nothing is said, nor of the whole.
    """
    told = [i for i in range(spec.n_layers) if f"attn_write.{i}" not in spec.refused]
    if not told or not all(spec.blocks[i].writes for i in told):
        return False
    sites = ("attn_write", "mlp_write", "resid_mid")
    sites += tuple(f"{of}write" for of in _sources(spec))
    having = [i for i in told if not layers[i].reshapes(spec.hidden)]
    passed = _check_reshaping([i for i in told if i not in having], spec, layers, check, sites)
    if not having:
        return passed
    pairs = [(layers[i], spec.blocks[i]) for i in having]
    if not any(b.norm_mid or b.norm_post or b.rescales for _, b in pairs):
        totals: list[Tensor] = []
        dtype = layers[-1].output.dtype
        eps, roundings, most = rounding(dtype), 0, 0.0
        runs = _runs(having, spec)
        for run in runs:
            totals.append(layers[run[0]].hidden(spec.hidden).double())
            for layer, block in ((layers[i], spec.blocks[i]) for i in run):
                pre, post = layer.hidden(spec.hidden).double(), layer.output
                parts = written(layer, block.writes, pre.shape)
                most = max(most, float(off_by(pre, post.double(), parts, eps).max()))
                totals[-1] = totals[-1] + sum(parts)
                roundings += len(parts)
        detail = "each block adds its writes, entry by entry to the rounding of these additions"
        passed &= judge("block writes", most * eps, detail, sites, SLACK * eps)
        if linked:
            # An addition rounds by at most eps/2 of the stream, and n independent roundings add up to
            # sqrt(n) of one; times 4, since the stream may have been larger on the way.
            allowed = max(relative_tolerance(dtype), 2 * eps * roundings**0.5)
            detail = "embedding plus writes equals the final residual"
            if len(spec.stages) > 1:
                detail = "what a stage begins with plus its writes equals what it ends with"
            elif len(having) < spec.n_layers:
                detail = (
                    f"what layers {ranges(having)} read plus their writes equals what they return"
                )
            finals = [layers[run[-1]].output for run in runs]
            passed &= check("writes", totals, finals, detail, sites, allowed)
        return passed
    made = [remade(layer, block, spec.hidden) for layer, block in pairs]
    wanted = [layer.output for layer, _ in pairs]
    which = "" if len(having) == spec.n_layers else f" (layers {ranges(having)})"
    detail = f"each block's writes, through its norms and carries, give what it returns{which}"
    return check("writes", made, wanted, detail, sites) and passed


def _runs(which: Sequence[int], spec: Spec) -> list[list[int]]:
    """These layers, cut where a stage starts or one between is missing."""
    runs: list[list[int]] = []
    for i in which:
        if runs and runs[-1][-1] == i - 1 and not spec.blocks[i].starts_stage:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def _check_reshaping(
    which: Sequence[int], spec: Spec, layers: list[Layer], check: Check_, sites: tuple[str, ...]
) -> bool:
    """What blocks that return another shape write: all of what they return, or all that is added before."""
    passed = True
    for pools in (True, False):
        made, wanted = [], []
        some = [i for i in which if bool(spec.blocks[i].reshapes_behind) == pools]
        for layer, block in ((layers[i], spec.blocks[i]) for i in some):
            start = layer.hidden(spec.hidden).double()
            if block.reshapes_behind:
                end = layer.inside.calls[block.reshapes_behind][0].inputs[0].reshape(start.shape)
            else:
                start, end = torch.zeros_like(layer.output).double(), layer.output
            made.append(added(start, layer, block.writes))
            wanted.append(end)
        if some:
            detail = (
                f"resid_pre plus writes equals what is read before the stream is pooled (layers {ranges(some)})"
                if pools
                else f"writes alone make a stream of another shape (layers {ranges(some)})"
            )
            passed &= check("reshaping", made, wanted, detail, sites)
    return passed


def _linear(seen: Recording, name: str, d_in: int) -> tuple[Tensor, Tensor]:
    """(W, b) of a linear layer in float64, where the recorded tensors are."""
    module = seen.module.get_submodule(name)
    W, b = linear_map(module, d_in, module_device(module))
    return W.cpu().double(), b.cpu().double()


def _whole_maps(spec: Spec, x: Tensor) -> Tensor:
    """A model's output; a map over an image, whose last axis holds no channels, as one vector an image."""
    return x.flatten(1) if spec.d_vocab is None and x.ndim >= 4 else x


def _side_by_side(
    got: Sequence[Tensor], wanted: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Vectors of all layers as one a position, of each stage (whose number of positions may be its own)."""
    places: dict[torch.Size, list[int]] = {}
    for i, x in enumerate(wanted):
        places.setdefault(x.shape[:-1], []).append(i)
    for same in places.values():
        yield torch.cat([got[i] for i in same], -1), torch.cat([wanted[i] for i in same], -1)
