"""The blocks of a clean run, called one by one on changed inputs, only at the positions that matter.

With every head's z held, positions do not interact: a block is then a function of one position, so it is
called with its attention module returning the clean output, on any subset of positions and any number of
variants. What a changed q, k or v does to z is computed here (softmax of scaled scores, fitted to the
captured ones), and from the receiver on only the changed positions run, against the clean keys and
values of the earlier ones. Every part is tried on the clean run before it is used (`verify`); where one
does not reproduce it, the plain engine has to do the work.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuits.block_calls import Call, recorded_calls
from circuits.columns import Columns
from circuits.final_metric import FinalMetric
from circuits.measure import Measure
from circuits.softmaxes import Softmax, fitted
from interp.errors import Refused
from interp.models.attention import Watch, window
from interp.models.calls import text_config
from interp.models.forwards import other_forwards
from interp.models.hooks import Stop, with_hidden
from interp.models.layout import shown
from interp.models.model import Model
from interp.models.spec import first_tensor, module_device, with_first
from interp.models.verify import relative_error, relative_tolerance
from interp.run.cache import Run

TOKENS = 1024
"""Tokens of one call, variants × prompts × positions: what an MLP makes of more leaves the processor's cache."""

Streams = Float[Tensor, "variants n pos d_model"]
"""Residual vectors of several variants of every prompt, at some positions."""

SITES = ("resid_pre", "attn_out", "q", "k", "v", "z")
"""What the clean run has to have captured, beside the last `resid_post`."""


class PathReplay:
    """A clean run taken apart.

    Args:
        run: of the clean prompts, with SITES and the last resid_post captured.
        measure: the metric that `read` gives.

    Attributes:
        work: parameter-tokens multiplied so far (see `forwards`).
    """

    def __init__(self, model: Model, run: Run, measure: Measure):
        self.model, self.run, self.measure = model, run, measure
        self.size, self.length = run.batch.ids.shape
        self.rows = slice(None)
        self._metric = FinalMetric(model, measure)
        self.work = 0
        self._calls: dict[Columns, list[Call]] = {}
        self._watch: Callable[[nn.Module], Watch] = lambda module: Watch()
        self._open = False

    # --- the clean run -----------------------------------------------------------------------------

    def clean(self, site: str, columns: Columns | None = None) -> Tensor:
        """A captured site of one layer, [n pos ...] at `columns`."""
        value = self.run.cache[site][self.rows]
        return value if columns is None else value[:, list(columns)]

    def clean_streams(self, layer: int, columns: Columns) -> Streams:
        """The clean residual stream before block `layer` (n_layers: after the last), one variant."""
        last = self.model.n_layers
        site = f"resid_pre.{layer}" if layer < last else f"resid_post.{last - 1}"
        return self.clean(site, columns)[None]

    def suffix(self, columns: Columns) -> Columns:
        """The positions that a change at `columns` can reach: in a causal model, those from the first on."""
        return tuple(range(columns[0] if self.model.spec.causal else 0, self.length))

    def calls(self, columns: Columns) -> list[Call]:
        """How every block is called on these positions, recorded from a pass over one prompt.

        One row, so that rotary tables and the like broadcast over any number of variants. The masks in
        it are never used: z is held, or computed by `head_outputs`.
        """
        if columns not in self._calls:
            self._calls[columns] = recorded_calls(self.model, self.run.batch.ids[:1], columns)
        return self._calls[columns]

    @cached_property
    def softmaxes(self) -> list[Softmax | None]:
        """Every layer's way from q · k to weights; None where none fits."""
        sites = ("q", "k", "scores", "pattern")
        run = self.model.run(self.run.batch.rows(slice(1)), capture=sites, logits=False)
        cap = getattr(text_config(self.model.module), "attn_logit_softcapping", None)
        found: list[Softmax | None] = []
        for layer in range(self.model.n_layers):
            q, k, scores, pattern = (run.cache[f"{site}.{layer}"][0].float() for site in sites)
            found.append(fitted(q, k, scores, pattern, cap, self.model.dtype))
        return found

    # --- parts of a block ----------------------------------------------------------------------------

    def frozen_block(
        self,
        layer: int,
        streams: Streams,
        columns: Columns,
        attention: Float[Tensor, "*variants n pos d_model"] | None = None,
        *,
        mlp_write: bool = False,
    ) -> Streams:
        """The block's output with z held: only its norms and its MLP are computed.

        Args:
            attention: what the attention module's output projection returns, one for all variants or
                one each; the clean one by default.
            mlp_write: return what the MLP writes instead.
        """
        call, block = self.calls(columns)[layer], self.model.spec.blocks[layer]
        given = self.clean(f"attn_out.{layer}", columns) if attention is None else attention
        own = given.ndim == 4
        out: list[Tensor] = []
        with ExitStack() as stack:
            if mlp_write:
                assert block.mlp_write is not None
                module = self.model.module.get_submodule(block.mlp_write.module)
                written: list[Tensor] = []
                hook = module.register_forward_hook(  # a copy: Falcon adds to it in place
                    lambda m, args, output: written.append(first_tensor(output).clone())  # type: ignore[union-attr]
                )
                stack.callback(hook.remove)
            for chunk in self._chunks(len(streams), len(columns)):
                x = streams[chunk]
                z = given[chunk] if own else given.expand(len(x), *given.shape)
                with self._attention_returns(layer, call, z.flatten(0, 1)):
                    y = self._call_block(layer, call, x.flatten(0, 1).clone())
                if mlp_write:
                    y = written.pop().to(x.device) * block.mlp_write.scale  # type: ignore[union-attr]
                out.append(y.reshape(x.shape))
        self._worked(streams.shape[:3].numel(), self._sizes[layer][1])
        return torch.cat(out)

    def projections(
        self, layer: int, streams: Streams, columns: Columns
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of a block on changed inputs, each [variants n heads pos d_head]."""
        call, shape = self.calls(columns)[layer], streams.shape[:2]
        found: list[tuple[Tensor, ...]] = []
        self._watch = lambda module: _Projections(found)
        with self.seen():
            for chunk in self._chunks(len(streams), len(columns)):
                try:
                    self._call_block(layer, call, streams[chunk].flatten(0, 1))
                except Stop:
                    continue
        self._worked(streams.shape[:3].numel(), self._sizes[layer][2])
        q, k, v = (
            (parts[0] if len(parts) == 1 else torch.cat(parts))
            .to(streams.device)
            .unflatten(0, shape)
            for parts in zip(*found, strict=True)
        )
        return q, k, v

    def head_outputs(
        self,
        layer: int,
        head: int,
        rows: Columns,
        q: Float[Tensor, "variants n queries d_head"],
        k: Float[Tensor, "variants n pos d_head"],
        v: Float[Tensor, "variants n pos d_v"],
    ) -> Float[Tensor, "variants n queries d_v"]:
        """z of one head at query positions `rows`, over all keys."""
        softmax = self.softmaxes[layer]
        assert softmax is not None
        products = torch.einsum("xnqd,xnkd->xnqk", q.float(), k.float())[:, :, None]
        weights = softmax.weights(products, rows, slice(head, head + 1))[:, :, 0]
        return torch.einsum("xnqk,xnkd->xnqd", weights, v.float()).to(v.dtype)

    def rest(self, layer: int, streams: Streams, columns: Columns) -> Streams:
        """The final residual at the last position, of streams changed at `columns` before block `layer`.

        `columns` is a suffix; earlier positions have their clean keys and values.
        """
        if layer == self.model.n_layers:
            return streams[:, :, -1:]
        calls = self.calls(columns)
        layers = {
            self.model.module.get_submodule(block.attention): index
            for index, block in enumerate(self.model.spec.blocks)
            if block.attention
        }
        out = []
        self._watch = lambda module: _SuffixAttention(self, layers[module], columns)
        with self.seen():
            for chunk in self._chunks(len(streams), len(columns)):
                x = streams[chunk].flatten(0, 1)
                for index in range(layer, self.model.n_layers):
                    x = self._call_block(index, calls[index], x)
                out.append(x[:, -1:].unflatten(0, (-1, streams.shape[1])))
        whole = sum(size for size, _, _ in self._sizes[layer:])
        self._worked(streams.shape[:3].numel(), whole)
        return torch.cat(out)

    @contextmanager
    def seen(self) -> Iterator[None]:
        """Inside, attention calls are seen; opening the window once serves many small calls."""
        if self._open:
            yield
            return
        with window(self.model.module, lambda module: self._watch(module)):
            self._open = True
            try:
                yield
            finally:
                self._open = False

    # --- the ends --------------------------------------------------------------------------------

    def read(self, final: Streams) -> Float[Tensor, "variants n"]:
        """The metric of every variant and prompt, from final residuals [variants n 1 d_model]."""
        final = final[:, :, -1]
        self._worked(final.shape[:2].numel(), self._metric.parameters)
        return self._metric(final, self.rows)

    @cached_property
    def clean_metric(self) -> Float[Tensor, "1 n"]:
        """The metric of the clean prompts, read in the same way."""
        return self.read(self.clean_streams(self.model.n_layers, (self.length - 1,)))

    def forwards(self, work: int | None = None) -> float:
        """Work so far in units of F, a plain forward over the batch: parameters × tokens over the same of F."""
        sizes = sum(size for size, _, _ in self._sizes)
        head = (self.model.spec.d_vocab or 0) * self.model.spec.d_model
        return (self.work if work is None else work) / (self.size * self.length * (sizes + head))

    @cached_property
    def _sizes(self) -> list[tuple[int, int, int]]:
        """Parameters of each block: all, those outside the attention module, those that make q, k and v."""
        sizes = []
        for block in self.model.spec.blocks:
            whole, attention, W_O = (
                0
                if name is None
                else sum(p.numel() for p in self.model.module.get_submodule(name).parameters())
                for name in (block.name, block.attention, block.W_O)
            )
            inside = bool(block.W_O and block.W_O.startswith(f"{block.attention}."))
            sizes.append((whole, whole - attention, attention - (W_O if inside else 0)))
        return sizes

    # --- identities ----------------------------------------------------------------------------------

    def verify(self, columns: Columns, *, blocks: bool, attention: bool) -> str | None:
        """None where every part reproduces the clean run of two prompts; else what does not.

        Args:
            columns: the positions that will be computed.
            blocks: whether blocks are called with z held.
            attention: whether projections, z and the rest of the model after a head are needed too.
        """
        try:
            return self._first_fault(columns, blocks, attention)
        except (Refused, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            # A block that cannot be called on its own raises what its own code raises.
            return f"a block cannot be called on its own ({type(error).__name__}: {error})"

    def _first_fault(self, columns: Columns, blocks: bool, attention: bool) -> str | None:
        allowed = relative_tolerance(self.model.dtype)
        eps = torch.finfo(self.model.dtype).eps
        _ = self.softmaxes if attention else None  # shared by the copy
        few = copy.copy(self)
        few.rows = slice(0, 2)
        last = self.model.n_layers
        end = few.clean_streams(last, (self.length - 1,))
        error, _ = relative_error(few.read(end)[0], self.measure.clean[:2])
        if error > allowed:
            return "unembedding the final residual does not give the metric"
        if not blocks:
            return None
        suffix = self.suffix(columns)
        for layer in range(last):
            pre, post = (few.clean_streams(at, columns) for at in (layer, layer + 1))
            made = few.frozen_block(layer, pre, columns)
            # Against what the block writes, so that massive residuals hide nothing, and their rounding.
            room = allowed * (post - pre).abs().amax(-1) + 16 * eps * post.abs().amax(-1)
            error = (made - post).abs().amax(-1)
            if bool((error > room).any()):
                return f"block {layer} with z held is off by {float(error.max()):.1e}"
            if not attention:
                continue
            q, k, v = few.projections(layer, pre, columns)
            for site, x in (("q", q), ("k", k), ("v", v)):
                wanted = few.clean(f"{site}.{layer}", columns)
                error = relative_error(x[0].transpose(1, 2), wanted)[0]
                if error > allowed:
                    return f"{site} of block {layer} called on its own is off by {error:.1e}"
            if self.softmaxes[layer] is None:
                return f"the pattern of layer {layer} is no softmax of scaled q · k"
        if attention:
            made = few.rest(0, few.clean_streams(0, suffix), suffix)
            error, _ = relative_error(few.read(made)[0], self.measure.clean[:2])
            if error > allowed:
                return f"the last positions against clean keys and values are off by {error:.1e}"
        return None

    # --- calling ---------------------------------------------------------------------------------

    def _call_block(self, layer: int, call: Call, hidden: Tensor) -> Tensor:
        args, kwargs = with_hidden(call.args, call.kwargs, hidden, self.model.spec, layer)
        out = first_tensor(self.model.blocks[layer](*args, **kwargs))
        assert out is not None
        return shown(out, self.model.spec.hidden_axes, len(hidden)).to(hidden.device)

    @contextmanager
    def _attention_returns(self, layer: int, call: Call, value: Tensor) -> Iterator[None]:
        """Inside, the block's attention costs nothing and its output projection returns `value`."""
        block = self.model.spec.blocks[layer]
        if block.attention is None or block.W_O is None:
            raise Refused(f"layer {layer} has no attention that could be held")
        module = self.model.module.get_submodule(block.attention)
        value = value.to(module_device(self.model.blocks[layer]))
        with ExitStack() as stack:
            if not block.W_O.startswith(f"{block.attention}."):
                # The projection is outside (ViT, BERT): the attention module returns anything.
                projection = self.model.module.get_submodule(block.W_O)
                stack.enter_context(other_forwards({projection: lambda *args, **kwargs: value}))
            if (
                block.v is not None
                and block.v.input not in ("", "resid_pre")
                and not block.parallel
            ):
                # Only the attention reads what this norm makes.
                norm = self.model.module.get_submodule(block.v.input)
                stack.enter_context(other_forwards({norm: lambda x: x}))
            stack.enter_context(
                other_forwards({module: lambda *args, **kwargs: with_first(call.attention, value)})
            )
            yield

    def _chunks(self, variants: int, positions: int) -> Iterator[slice]:
        rows = self.size if self.rows == slice(None) else 2
        most = max(1, TOKENS // (rows * positions))
        step = max(
            1, -(-variants // -(-variants // most))
        )  # of equal size, without a small last one
        return (slice(start, start + step) for start in range(0, variants, step))

    def _worked(self, tokens: int, parameters: int) -> None:
        self.work += tokens * parameters


class _Projections(Watch):
    """Keeps q, k and v, and goes no further."""

    def __init__(self, found: list[tuple[Tensor, ...]]):
        self.found = found

    def inputs(self, q, k, v):
        self.found.append((q, k, v))
        raise Stop


class _SuffixAttention(Watch):
    """Attention of the last positions over clean keys and values of the earlier ones and their own."""

    def __init__(self, replay: PathReplay, layer: int, columns: Columns):
        self.replay, self.layer, self.columns = replay, layer, columns

    def inputs(self, q, k, v):
        self.made = self._z(q, k, v)
        return q, k, v

    def z(self, z):
        return self.made.reshape(z.shape).to(z.device)

    def _z(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[batch queries n_heads d_v], variants one after the other along the batch."""
        replay, first = self.replay, self.columns[0]
        softmax = replay.softmaxes[self.layer]
        assert softmax is not None
        earlier_k = replay.clean(f"k.{self.layer}")[:, :first].float()
        earlier_v = replay.clean(f"v.{self.layer}")[:, :first].float()
        n, groups, dtype = len(earlier_k), k.shape[1], v.dtype
        q, k, v = (x.to(earlier_k.device) for x in (q, k, v))
        q = q.float().unflatten(1, (groups, -1)).unflatten(0, (-1, n))
        k, v = (x.float().unflatten(0, (-1, n)) for x in (k, v))
        # The clean keys are shared by all variants: one product for all of them.
        before = torch.einsum("xnhgqd,nkhd->xnhgqk", q, earlier_k)
        own = torch.einsum("xnhgqd,xnhkd->xnhgqk", q, k)
        products = torch.cat([before, own], -1).flatten(2, 3)
        weights = softmax.weights(products, self.columns, slice(None)).unflatten(2, (groups, -1))
        z = torch.einsum("xnhgqk,nkhd->xnqhgd", weights[..., :first], earlier_v)
        z = z + torch.einsum("xnhgqk,xnhkd->xnqhgd", weights[..., first:], v)
        return z.flatten(0, 1).flatten(2, 3).to(dtype)
