"""Which linear layers, and which of their outputs, queries, keys, values and neurons are made of.

The attention interface shows q and k after norms and rotary positions, so their values do not tell
the projection's columns. Codes do: at the first position a rotary embedding is the identity, and where
every column of a layer's output has a random ±1 a row, an entry of q goes up and down with the code of
its own column, with a norm in between or without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from interp.errors import Refused
from interp.models.attention import Watch, window
from interp.models.calls import call_model, main_input
from interp.models.hooks import Stop, hidden_of, with_hidden
from interp.models.probe import probe_batch
from interp.models.spec import Spec, module_device
from interp.models.weights import linear_map
from interp.run.batch import Batch

ROWS = 96
"""Length of a column's code. Two random codes of this length correlate by 0.1, the nearest of 50,000 by
0.5; an entry correlates with its own column's by 1, or some 0.9 where a norm takes out the mean of a head."""
SURE = 0.75


class Projections:
    """The weights that q, k, v and the neurons are made with, layer by layer."""

    def __init__(self, module: nn.Module, spec: Spec):
        self.module, self.spec = module, spec

    @cached_property
    def columns(self) -> dict[tuple[str, int], tuple[str, Tensor]]:
        """The linear layer and its columns [heads d_head] by ("q", "k" or "v", layer), where found."""
        return dict(self._found())

    @cached_property
    @torch.no_grad()
    def as_projected(self) -> bool:
        """Whether q and k are their projections as they are: no rotary positions, no norm between."""
        layer = next(iter(self.spec.attention_layers), -1)
        if not {("q", layer), ("k", layer)} <= set(self.columns):
            return False
        attention = self.module.get_submodule(self.spec.blocks[layer].attention or "")
        made = {self.columns[name, layer][0] for name in ("q", "k")}
        seen: list[Tensor] = []

        class Seeing(Watch):
            def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                seen.extend((q, k))
                return q, k, v

        with (
            self._outputs(dict.fromkeys(made, torch.ones_like)),
            window(self.module, lambda module: Seeing() if module is attention else Watch()),
        ):
            self._call(1, length=3)
        return all(torch.equal(x, torch.ones_like(x)) for x in seen)

    def weights(self, name: str, layer: int) -> tuple[Tensor, Tensor]:
        """(W [heads d_model d_head], b [heads d_head]) of "q", "k" or "v", before norms and rotary.

        Raises:
            Refused: no linear layer that reads the residual stream makes it (latent attention, say).
        """
        if (name, layer) not in self.columns:
            raise Refused(f"layer {layer}: no linear layer whose outputs are {name} was found")
        where, columns = self.columns[name, layer]
        d_model = self.spec.blocks[layer].d_model
        W, b = linear_map(self.module.get_submodule(where), d_model, module_device(self.module))
        if W.shape[0] != d_model:
            raise Refused(f"layer {layer}: {name} is read from a latent of width {W.shape[0]}")
        columns = columns.to(W.device)
        return W[:, columns].permute(1, 0, 2), b[columns]

    def neurons(self, layer: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        """((W_in [d_model d_mlp], b_in), (W_gate, b_gate) or None) of a layer's neurons.

        Raises:
            Refused: not one or two linear layers of this width (experts, a fused gate).
        """
        if layer not in self._readers:
            raise Refused(f"layer {layer}: its neurons are not made by one or two linear layers")
        device = module_device(self.module)
        maps = [
            linear_map(self.module.get_submodule(name), self.spec.blocks[layer].d_model, device)
            for name in self._readers[layer]
        ]
        return maps[0], maps[1] if len(maps) > 1 else None

    @cached_property
    def _readers(self) -> dict[int, list[str]]:
        """The one linear layer that neurons are made of, or the ungated and the gated one, by layer."""
        readers = {}
        for layer, block in enumerate(self.spec.blocks):
            linears = self._linears(block.name, outside=block.attention)
            found = [
                name for name, width in linears if name != block.W_out and width == block.d_mlp
            ]
            if len(found) == 1 or (len(found) == 2 and block.W_out is not None):
                readers[layer] = found
        pairs = {layer: found for layer, found in readers.items() if len(found) == 2}
        linear = self._linear(pairs) if pairs else set()
        # What neurons answer linearly is the ungated half.
        return readers | {i: p if i in linear else p[::-1] for i, p in pairs.items()}

    def _linears(self, inside: str, outside: str | None = None) -> list[tuple[str, int]]:
        """(name, width) of the linear layers under a module, leaves of its tree."""
        found = []
        for name, module in self.module.get_submodule(inside).named_modules(prefix=inside):
            weight = getattr(module, "weight", None)
            if (
                not isinstance(weight, Tensor)
                or weight.ndim != 2
                or next(module.children(), None) is not None
                or (outside is not None and name.startswith(outside + "."))
            ):
                continue
            width = getattr(module, "out_features", None) or getattr(module, "nf", None)
            found.append((name, int(width or weight.shape[0])))
        return found

    def _found(self) -> Iterator[tuple[tuple[str, int], tuple[str, Tensor]]]:
        candidates: dict[int, list[tuple[str, int]]] = {}
        for layer in self.spec.attention_layers:
            block = self.spec.blocks[layer]
            linears = self._linears(block.attention or "")
            candidates[layer] = [pair for pair in linears if pair[0] != block.W_O]
        for turn in range(max((len(found) for found in candidates.values()), default=0)):
            tried = {i: found[turn] for i, found in candidates.items() if turn < len(found)}
            for (name, layer), answer in self._answers(tried).items():
                module, width = tried[layer]
                columns = _columns(answer, _codes(width).to(answer.device))
                if columns is not None:
                    yield (name, layer), (module, columns)

    @torch.no_grad()
    def _answers(self, tried: dict[int, tuple[str, int]]) -> dict[tuple[str, int], Tensor]:
        """q, k and v [rows heads d_head] of each layer where its linear's output is every column's code."""
        attentions = {
            self.module.get_submodule(self.spec.blocks[layer].attention or ""): layer
            for layer in tried
        }
        kept: dict[tuple[str, int], Tensor] = {}

        def coded(out: Tensor) -> Tensor:
            codes = _codes(out.shape[-1]).to(out)
            # a table of relative positions, say, has no rows of the batch
            return codes.reshape(out.shape) if codes.numel() == out.numel() else out

        def listen(module: nn.Module) -> Watch:
            return _Kept(kept, attentions[module]) if module in attentions else Watch()

        with (
            self._outputs({name: coded for name, _ in tried.values()}),
            window(self.module, listen),
        ):
            self._call(ROWS)
        return kept

    @torch.no_grad()
    def _linear(self, pairs: dict[int, list[str]]) -> set[int]:
        """The layers whose neurons double when the first of two linear layers' outputs does."""
        seen: dict[int, Tensor] = {}

        def doubling(out: Tensor) -> Tensor:
            new = torch.ones_like(out)
            new[-1:] = 2.0
            return new

        changes: dict[str, Callable[[Tensor], Tensor]] = {}
        with ExitStack() as stack:
            for layer, (first, second) in pairs.items():
                changes |= {first: doubling, second: torch.ones_like}

                def keep(module: nn.Module, args: tuple, layer: int = layer) -> None:
                    seen[layer] = args[0].reshape(2, -1).float()

                reader = self.module.get_submodule(self.spec.blocks[layer].W_out or "")
                stack.callback(reader.register_forward_pre_hook(keep).remove)
            stack.enter_context(self._outputs(changes))
            self._call(2)
        return {i for i, x in seen.items() if torch.allclose(x[1], 2 * x[0], rtol=1e-2)}

    def _call(self, rows: int, length: int = 1) -> None:
        """One forward of `rows` equal prompts, up to the last block.

        Every block reads what it reads in the last row, so that only its own changed layer tells rows
        apart, and one forward serves all layers.
        """
        if (reads := main_input(self.module)) != "input_ids":
            raise Refused(f"projections are found with token ids, and this model reads '{reads}'")
        if self.spec.shared:
            raise Refused("layers share their modules: projections are not told apart by layer")
        prompt = probe_batch(self.module).ids[:1, :length]
        batch = Batch.of_ids(prompt.repeat(rows, 1)).to(module_device(self.module))

        def stop(module: nn.Module, args: tuple, output: object) -> None:
            raise Stop

        def same(layer: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            hidden = hidden_of(args, kwargs, self.spec, layer)
            last = hidden[-1:].expand_as(hidden).contiguous()
            return with_hidden(args, kwargs, last, self.spec, layer)

        blocks = [self.module.get_submodule(block.name) for block in self.spec.blocks]
        with ExitStack() as stack:
            for layer, block in enumerate(blocks):
                hook = block.register_forward_pre_hook(partial(same, layer), with_kwargs=True)
                stack.callback(hook.remove)
            stack.callback(blocks[-1].register_forward_hook(stop).remove)
            try:
                call_model(self.module, batch)
            except Stop:  # behind the last block
                return
            except (RuntimeError, IndexError) as error:  # Funnel pools what is not there
                raise Refused(
                    f"projections are found with prompts of {length} tokens, which "
                    f"{type(self.module).__name__} does not read: {error}"
                ) from error

    @contextmanager
    def _outputs(self, changes: dict[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        """Inside, these modules return something else."""
        with ExitStack() as stack:
            for name, change in changes.items():
                hook = self.module.get_submodule(name).register_forward_hook(
                    lambda module, args, out, change=change: change(out)
                )
                stack.callback(hook.remove)
            yield


class _Kept(Watch):
    """Keeps q, k and v of the first position."""

    def __init__(self, kept: dict[tuple[str, int], Tensor], layer: int):
        self.kept, self.layer = kept, layer

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for name, x in (("q", q), ("k", k), ("v", v)):
            self.kept[name, self.layer] = x[:, :, 0].float()
        return q, k, v


def _codes(width: int) -> Tensor:
    """A random ±1 code for each column [ROWS width]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (ROWS, width), generator=generator).float() * 2 - 1


def _columns(answer: Tensor, codes: Tensor) -> Tensor | None:
    """The column [heads d_head] whose code each entry of `answer` [rows heads d_head] follows."""
    codes = codes - codes.mean(0)
    codes = codes / codes.norm(dim=0)
    answer = answer - answer.mean(0)
    answer = answer / answer.norm(dim=0).clamp_min(1e-12)
    found = []
    for head in answer.unbind(1):
        likeness, column = (codes.T @ head).abs().max(dim=0)
        if float(likeness.min()) < SURE:
            return None
        found.append(column)
    return torch.stack(found)
