"""Model: a Hugging Face module, its verified map, and the two ways to call it: run and replay."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from itertools import cycle
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from interp.errors import BadInput, Refused
from interp.models import kernels, replaced
from interp.models.attention import Watch, window
from interp.models.calls import (
    DRAWS,
    call_model,
    check_kept,
    check_source,
    check_tokens,
    drawing,
    has_tokens,
    is_encoder_decoder,
    output_tensor,
)
from interp.models.codebooks import begun, in_codebooks
from interp.models.forwards import hooks_called
from interp.models.grids import named_as_taken, with_images_apart
from interp.models.hooks import (
    BlockInput,
    BlockOutput,
    Middle,
    Plan,
    RunWatch,
    Stop,
    Turns,
    write_change,
)
from interp.models.inputs import check_kind, faults_of_input
from interp.models.layout import (
    CHANNELS_BEFORE,
    ONE_AFTER_THE_OTHER,
    Layout,
    held_inside,
    require_tokens_alone,
    shown_inside,
)
from interp.models.packed import by_row
from interp.models.probe import probe
from interp.models.readout import unembed
from interp.models.repeated import CallsOnStream
from interp.models.several import Part, attention_calls
from interp.models.skipping import skipping
from interp.models.spec import BlockMap, first_tensor, module_device, with_first
from interp.models.turned import channels_first, channels_last
from interp.models.weights import FrozenNorm, linear_map
from interp.models.windows import Layouts, in_one_row
from interp.run.batch import Batch
from interp.run.cache import Cache, Run
from interp.run.edits import Edit, Seen
from interp.run.statistics import RowStatistics, Statistic
from interp.sites import ATTENTION_SITES, CROSS_SITES, Site

T = TypeVar("T")

TOKENS_PER_FORWARD = 4096
"""How many tokens a replay puts into one forward, variants times prompts together."""


class Model:
    """A Hugging Face model with named sites.

    Attributes:
        module: the module itself, unchanged. tokenizer: or None. id: the name shown in reports.
        spec: the verified map (`interp.models.spec.Spec`). notes: what loading had to say.

    >>> model = tiny_model()
    >>> run = model.run(torch.tensor([[5, 6, 7]]), capture=["z", "resid_post.1"])
    >>> run.cache["z"].shape, run.cache["resid_post.1"].shape
    (torch.Size([1, 3, 2, 4, 8]), torch.Size([1, 3, 32]))
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any = None,
        id: str = "model",
        *,
        notes: Sequence[str] = (),
    ):
        self.module = module.eval()
        self.tokenizer = tokenizer
        self.id = id
        self.notes = tuple(notes)
        before = replaced.kinds(self.module)
        self.spec = probe(self.module)
        self.notes += replaced.note(before, replaced.kinds(self.module))
        if self.module in drawing:
            self.notes += (DRAWS,)
        self.notes += kernels.note(self.module, self.spec.between_kernels)
        self.notes += (self.spec.unseen,) if self.spec.unseen else ()
        self._windows = Layouts(self.module, self.spec)
        # Positions are an index into the last hidden state, which may lie on another device than they.
        self._keeps_logits = (
            "logits_to_keep" in inspect.signature(type(module).forward).parameters
            and len({parameter.device for parameter in module.parameters()}) == 1
        )

    def __repr__(self) -> str:
        s = self.spec
        return f"Model({self.id!r}, {s.family}, n_layers={s.n_layers}, n_heads={s.n_heads}, d_model={s.d_model})"

    if not TYPE_CHECKING:  # checkers shall go on finding misspelled names

        def __getattr__(self, name: str) -> Any:
            from interp.transformer_lens import View, missing_attribute

            raise missing_attribute(self, name, View)

        def __call__(self, *given: Any, **options: Any) -> None:
            raise TypeError(
                "a Model is not called: model.run(text).logits are its logits; as in TransformerLens: "
                "interp.transformer_lens.view(model)(text); the Hugging Face module is model.module"
            )

    # --- facts ---------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return module_device(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.module.parameters()).dtype

    @property
    def n_layers(self) -> int:
        """Blocks of the stack."""
        return self.spec.n_layers

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks themselves.

        Raises:
            Refused: a layer is several modules called one after the other, in the model's own forward.
        """
        for block in self.spec.blocks:
            if block.members:
                names = ", ".join(f"'{member.name}'" for member in block.members)
                raise Refused(
                    f"layers of {self.id} are no modules, which this calls by themselves: {names} are called in "
                    "turn; model.run with captures and edits, and model.replay, work"
                )
        return [module for (module,) in self.parts]

    @property
    def parts(self) -> list[list[nn.Module]]:
        """The modules of each layer: one block, in most models, or several called one after the other."""
        names = [
            [member.name for member in block.members] or [block.name] for block in self.spec.blocks
        ]
        return [[self.module.get_submodule(name) for name in each] for each in names]

    def layers_with(self, name: str) -> list[int]:
        """The layers that have the site called `name`; raises Refused with the reason if none."""
        if name in self.spec.refused:
            raise Refused(f"{self.id} cannot give '{name}': {self.spec.refused[name]}")
        if name == "embed":
            return [0]
        return [layer for layer in range(self.n_layers) if self._has(name, layer)]

    def _has(self, name: str, layer: int) -> bool:
        block = self.spec.blocks[layer]
        if name in CROSS_SITES:
            cross = block.cross
            address = {"cross_out": cross and cross.out, "cross_write": cross and cross.write}
            return address.get(name, cross) is not None
        if name in ATTENTION_SITES:
            return block.attention is not None
        if name == "resid_mid":
            return bool(block.before_mid)
        address = {
            "attn_out": block.attn_out,
            "attn_write": block.attn_write,
            "mlp_post": block.W_out,
            "mlp_out": block.mlp_out,
            "mlp_write": block.mlp_write,
        }
        return address.get(name, "resid") is not None

    # --- weights -------------------------------------------------------------------------------

    def W_O(self, layer: int, *, cross: bool = False) -> Tensor:
        """Output projection of a layer, one slice a head [n_heads d_head d_model].

        `cross`: that of its attention to a source, which maps cross_z to cross_out.
        """
        W, _ = self._attention_output(layer, cross)
        of = self.spec.blocks[layer].cross if cross else self.spec.blocks[layer]
        assert of is not None
        return W.reshape(of.n_heads, of.d_head, -1)

    def b_O(self, layer: int, *, cross: bool = False) -> Tensor:
        """Bias of a layer's output projection [d_model]; zeros where it has none."""
        return self._attention_output(layer, cross)[1]

    def W_out(self, layer: int) -> Tensor:
        """What each neuron of a layer writes, before scale and norm [d_mlp d_model]."""
        return self._mlp_output(layer)[0]

    def b_out(self, layer: int) -> Tensor:
        """Bias of the linear layer that reads a layer's neurons [d_model]; zeros where it has none."""
        return self._mlp_output(layer)[1]

    def _attention_output(self, layer: int, cross: bool) -> tuple[Tensor, Tensor]:
        self._layers_of("cross_out" if cross else "attn_out")
        block = self.spec.blocks[layer]
        of = block.cross if cross else block
        if of is None or of.W_O is None:
            raise Refused(f"layer {layer} of {self.id} has no attention output projection")
        if block.between and not cross:
            what = "times a gate" if block.between == "gate" else "only through a function of it"
            raise Refused(
                f"layer {layer} of {self.id}: '{block.W_O}' reads z {what}, so no head has a linear "
                "map from z to its output; sites z and attn_out are there"
            )
        width = of.n_heads * of.d_head
        return linear_map(self.module.get_submodule(of.W_O), width, self.device)

    def _mlp_output(self, layer: int) -> tuple[Tensor, Tensor]:
        self.layers_with("mlp_post")
        block = self.spec.blocks[layer]
        if block.W_out is None:
            raise Refused(f"layer {layer} of {self.id} has no one linear layer from neurons")
        return linear_map(self.module.get_submodule(block.W_out), block.d_mlp, self.device)

    def W_V(self, layer: int) -> Tensor:
        """Value projection of a layer, one slice a kv head [n_kv_heads d_model d_head].

        It reads the block's normed input; the norm's gain is folded in, so a residual vector divided
        by its norm's scale can be multiplied with it. Refused where v is not a linear map of that
        input (latent attention, shared values).
        """
        block = self.spec.blocks[layer]
        if block.v is None:
            raise Refused(
                f"layer {layer} of {self.id}: no linear layer whose outputs are v was found"
            )
        if not block.v.input or self.spec.n_streams > 1:
            raise Refused(
                f"layer {layer} of {self.id}: v is not read from the normed residual stream"
            )
        W, _ = linear_map(self.module.get_submodule(block.v.module), block.d_model, self.device)
        if W.shape[0] != block.d_model:
            raise Refused(
                f"layer {layer} of {self.id}: v is read from a latent of width {W.shape[0]}"
            )
        gain = torch.ones(block.d_model)
        if block.v.input != "resid_pre":
            gain = self.norm(block.v.input).gain
        columns = block.v.columns.to(W.device)
        return (gain.to(W)[:, None, None] * W[:, columns]).permute(1, 0, 2)

    @property
    def W_U(self) -> Tensor:
        """Unembedding [d_model d_vocab], without the final norm's gain (see `final_norm`)."""
        self._require_unembedding()
        W, _ = linear_map(
            self.module.get_submodule(self.spec.unembedding or ""), self.spec.d_model, self.device
        )
        return W

    @property
    def W_E(self) -> Tensor:
        """Token embedding [d_vocab d_model]."""
        if self.spec.embedding is None:
            raise Refused(f"{self.id} has no token embedding")
        return self.module.get_submodule(self.spec.embedding).weight  # type: ignore[return-value]

    @cached_property
    def final_norm(self) -> FrozenNorm:
        """The final norm, to be held fixed for direct attribution; the identity where there is none."""
        return self.norm(self.spec.final_norm)

    def norm(self, name: str | None) -> FrozenNorm:
        """The norm of the residual stream that the module called `name` is; the identity for None."""
        module = None if name is None else self.module.get_submodule(name)
        around = (b for b in self.spec.blocks if f"{name}.".startswith(f"{b.name}."))
        block = next(around, None)
        if block is None:
            return FrozenNorm(module, self.spec.d_model, self.device)
        turned = block.axes == CHANNELS_BEFORE
        return FrozenNorm(module, block.d_model, self.device, turned=turned)

    def unembed(self, residual: Tensor) -> Tensor:
        """Logits [... d_vocab] of final residual vectors [... d_model], as the model makes them."""
        if not self.spec.readout:
            self._require_unembedding()
        return unembed(self.spec, self.module, residual)

    def require_sum(self, what: str) -> None:
        """Refuse `what` unless the final residual is embedding plus attention and MLP writes.

        Blocks that normalise after adding, write something else besides or scale channels of a write
        have the sites attn_write and mlp_write all the same; but these do not add up to the residual. Nor
        is it taken apart by token where a model has positions of its own besides.
        """
        require_tokens_alone(self.spec.hidden_axes, what)
        if reason := self.spec.not_a_sum:
            raise Refused(
                f"{self.id} cannot be used for {what}, which takes the residual stream for the sum of "
                f"attn_write and mlp_write: {reason}"
            )

    def _require_unembedding(self) -> None:
        if self.spec.unembedding is None or "unembedding" in self.spec.refused:
            reason = self.spec.refused.get("unembedding", "it has no language-model head")
            raise Refused(f"{self.id} cannot be unembedded: {reason}")

    # --- tokens --------------------------------------------------------------------------------

    def tokenize(
        self, prompts: str | Sequence[str], *, padding_side: str = "right", bos: bool | None = None
    ) -> Batch:
        """Token ids, mask and positions of texts; padded on either side to the same result.

        `bos=True` puts a BOS token first where the tokenizer did not, `bos=False` leaves it out;
        by default the tokenizer decides, as in Hugging Face. For an encoder-decoder the texts are
        sources: give `run` their inputs and "decoder_input_ids" besides.
        """
        if self.tokenizer is None:
            raise BadInput(
                f"{self.id} was loaded without a tokenizer: pass token ids, or load with tokenizer="
            )
        texts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(texts, Iterable) or not all(isinstance(text, str) for text in texts):
            raise BadInput(
                f"a {type(prompts).__name__} that is no text or list of texts; token ids are a tensor "
                "[batch pos]: torch.tensor([[5, 6, 7]])"
            )
        texts = list(texts)
        if not texts or not all(texts):
            raise BadInput(
                f"prompt {texts.index('') if texts else 0} is empty: give at least one token of text"
            )
        if padding_side not in ("left", "right"):
            raise BadInput(f"padding_side '{padding_side}' is neither 'left' nor 'right'")
        rows = [list(self.tokenizer(text)["input_ids"]) for text in texts]
        first = self.tokenizer.bos_token_id
        if bos is True and first is None:
            raise BadInput(f"the tokenizer of {self.id} has no BOS token; leave out bos=True")
        if bos is not None and first is not None:
            rows = [row[1:] if row and row[0] == first else row for row in rows]
            rows = [[first, *row] for row in rows] if bos else rows
        if empty := [text for text, row in zip(texts, rows, strict=True) if not row]:
            raise BadInput(f"prompt {empty[0]!r} has no tokens: give at least one token of text")
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = torch.full((len(rows), longest), pad)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            where = slice(longest - len(row), None) if padding_side == "left" else slice(len(row))
            ids[i, where], mask[i, where] = torch.tensor(row), True
        return Batch.of_ids(ids, mask)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Each token's text, as it reads on its own; `#id` without a tokenizer."""
        if isinstance(ids, str) or getattr(ids, "ndim", 1) != 1:
            raise BadInput("tokens of one row of ids: model.tokens(model.tokenize(text).ids[0])")
        if self.tokenizer is None:
            return [f"#{int(i)}" for i in ids]
        return [self.tokenizer.decode([int(i)], clean_up_tokenization_spaces=False) for i in ids]

    def token_id(self, token: str | int) -> int:
        """The id of one token, given as its text or its id.

        >>> tiny_model().token_id(3)
        3

        Raises:
            BadInput: an id outside the vocabulary; a text that is not one token (says how it splits).
        """
        d_vocab = self.spec.d_vocab or 0
        if isinstance(token, int):
            if 0 <= token < d_vocab:
                return token
            raise BadInput(
                f"token id {token} is outside the vocabulary: {self.id} has ids 0 to {d_vocab - 1}"
            )
        if self.tokenizer is None:
            raise BadInput(
                f"{self.id} was loaded without a tokenizer: give the id of {token!r} instead"
            )
        ids = list(self.tokenizer(token, add_special_tokens=False)["input_ids"])
        if len(ids) == 1:
            unknown = getattr(self.tokenizer, "unk_token", None)
            if self.tokens(ids) == [unknown] and token.strip() != unknown:
                raise BadInput(f"{token!r} is not in the vocabulary of {self.id}: {unknown} there")
            return self.token_id(ids[0])
        spaced = self.tokenizer(f" {token}", add_special_tokens=False)["input_ids"]
        hint = f"did you mean {' ' + token!r}?" if len(spaced) == 1 else "name one of them"
        split = " + ".join(repr(part) for part in self.tokens(ids)) or "nothing"
        raise BadInput(
            f"{token!r} is {len(ids)} tokens of {self.id}, wanted one: it splits into {split}; {hint}"
        )

    def as_batch(self, data: Batch | Tensor | str | Sequence[str] | Mapping[str, Tensor]) -> Batch:
        """Any accepted form of input as a checked Batch on the model's device."""
        data = named_as_taken(self.module, data)
        check_kind(self.module, data)
        if isinstance(data, Batch):
            batch = data
        elif isinstance(data, Tensor):
            batch = Batch.of_ids(data[None] if data.ndim == 1 else data)
        elif isinstance(data, Mapping):
            batch = Batch.of_inputs(data)
        else:
            batch = self.tokenize(data)
        if not batch.has_source and is_encoder_decoder(self.module):
            if isinstance(data, (Batch, Tensor)):
                raise BadInput(
                    f"{self.id} is an encoder-decoder and was given one sequence of token ids, as what "
                    "reads a causal model's text does; that cannot be done here. model.run and "
                    'interp lens take a source as text, model.run {"input_ids": the source, '
                    '"decoder_input_ids": what the decoder has read}; Model(module.get_encoder()) is '
                    "one stack"
                )
            batch = begun(self.module, batch)
        batch = with_images_apart(self.module, in_codebooks(self.module, batch))
        if self.spec.blocks[0].axes in ONE_AFTER_THE_OTHER and not has_tokens(self.module, batch):
            # A mask of frames or pixels: rows are packed without padding.
            batch = replace(batch, mask=None)
        if has_tokens(self.module, batch):
            self._check_ids(batch.ids)
        if batch.has_source:
            check_source(self.module, batch)
        return batch.to(self.device)

    def _check_ids(self, ids: Tensor) -> None:
        n_ctx = self.spec.n_ctx
        if n_ctx is not None and ids.shape[1] > n_ctx:
            raise BadInput(
                f"the prompt has {ids.shape[1]} tokens, {self.id} reads at most {n_ctx} (n_ctx): shorten it"
            )
        check_tokens(ids, self.spec.d_vocab)

    # --- run and replay ------------------------------------------------------------------------

    def run(
        self,
        data: Batch | Tensor | str | Sequence[str] | Mapping[str, Tensor],
        capture: Iterable[str | Site] = (),
        edits: Sequence[Edit] = (),
        *,
        statistics: Mapping[str, Statistic] | None = None,
        stop_at: int | None = None,
        logits: bool | Tensor = True,
        grad: bool = False,
    ) -> Run:
        """One forward pass: logits, captured activations, row statistics.

        Args:
            data: text, token ids [batch pos], a Batch, or a mapping of model inputs. For an
                encoder-decoder a text is the source, its decoder having read its start token alone; or
                a mapping with `input_ids` (the source; of sound `input_features` or `input_values`)
                and `decoder_input_ids`.
            capture: sites to keep, after edits. Captured tensors are views where they can be.
            edits: applied in order at their sites.
            statistics: row statistics by name (`interp.run.statistics`), streamed over the pattern.
            stop_at: run only this many blocks; no logits then.
            logits: False skips the unembedding and every block after the last one needed; a
                LongTensor of positions unembeds only these, the same in every row: [-1] is the last
                column, which is padding in a shorter row that is padded on the right.
            grad: keep the graph, for `run.gradients`.

        Raises:
            BadInput: unknown site, head, or bad input. Refused: a site this model cannot give.
        """
        batch = self.as_batch(data)
        self._windows.of(batch)
        plan = self._plan(capture, edits, statistics)
        if stop_at is None and logits is False:
            stop_at = plan.last_layer + 1
        if stop_at is not None and not 0 <= stop_at <= self.n_layers:
            raise BadInput(f"stop_at={stop_at}: this model has {self.n_layers} blocks")
        with faults_of_input(self.module, batch):
            return self._forward(batch, plan, stop_at=stop_at, logits=logits, grad=grad)

    def replay(
        self,
        run: Run,
        variants: Sequence[Sequence[Edit]],
        metric: Callable[[Run], T],
        *,
        logits: bool | Tensor = True,
        capture: Iterable[str | Site] = (),
        progress: Callable[[int], None] | None = None,
        tokens_per_forward: int = TOKENS_PER_FORWARD,
    ) -> list[T]:
        """`metric` of every variant of a clean run, each a list of edits, many in one forward.

        Blocks before a variant's first edit are not computed again: their output is read from
        `run.cache["resid_pre"]`, so `run` must have captured it. Equal to `self.run(run.batch,
        edits=variant)` to rounding (batching may change the order of float additions).

        Args:
            run: a run with `capture=["resid_pre"]` and no edits.
            metric: called with each variant's Run; its result is kept.
            logits, capture: as in `run`; layers before a variant's first edit are not captured.
            progress: called with the number of variants done since the last call.
        """
        self._windows.of(run.batch)
        starts = [self._first_layer(variant) for variant in variants]
        results: list[Any] = [None] * len(variants)
        per_forward = max(1, tokens_per_forward // (run.batch.size * self._length(run)))
        order = sorted(range(len(variants)), key=lambda i: starts[i])
        for start in sorted(set(starts)):
            same = [i for i in order if starts[i] == start]
            for chunk in (same[i : i + per_forward] for i in range(0, len(same), per_forward)):
                joint = self._replayed(run, start, [variants[i] for i in chunk], logits, capture)
                for place, i in enumerate(chunk):
                    results[i] = metric(_part(joint, run.batch, len(chunk), place))
                if progress is not None:
                    progress(len(chunk))
        return results

    @contextmanager
    def hooked(
        self,
        data: Batch | Tensor | str | Sequence[str] | Mapping[str, Tensor],
        capture: Iterable[str | Site] = (),
        edits: Sequence[Edit] = (),
        *,
        clean: Run | None = None,
        start: int = 0,
    ) -> Iterator[Run]:
        """Inside, the module itself runs with these edits, whoever calls it (its `generate`, say).

        What is captured of the latest call is in the Run's cache; its logits are left to the caller.
        With a `clean` run that has captured resid_pre, blocks before `start` are not computed again;
        `data` is then any number of copies of its batch.
        """
        run = Run(self.as_batch(data))
        self._windows.of(run.batch)
        plan = self._plan(capture, edits, None)
        with ExitStack() as stack:
            stack.enter_context(hooks_called(self.module))
            self._hook(stack, run, plan, None, grad=False)
            if clean is not None:
                start = start if self.spec.chained else 0
                times = run.batch.size // clean.batch.size
                resid = clean.cache[Site("resid_pre", start)].repeat(times, 1, 1)
                stack.enter_context(
                    skipping(self.module, self.spec, start, resid, clean.extras, times)
                )
            yield run

    def _replayed(
        self, run: Run, start: int, variants: Sequence[Sequence[Edit]], logits, capture
    ) -> Run:
        size, n = run.batch.size, len(variants)
        edits = [
            edit.on_rows(slice(place * size, (place + 1) * size))
            for place, variant in enumerate(variants)
            for edit in variant
        ]
        plan = self._plan(capture, edits, None)
        resid = run.cache[Site("resid_pre", start)].repeat(n, 1, 1)
        stop_at = plan.last_layer + 1 if logits is False else None
        with skipping(self.module, self.spec, start, resid, run.extras, n):
            return self._forward(run.batch.repeat(n), plan, stop_at=stop_at, logits=logits)

    def _first_layer(self, edits: Sequence[Edit]) -> int:
        if not self.spec.chained:
            return 0
        if not edits:
            return self.n_layers - 1
        return min(min(edit.layers(self.layers_with(edit.site.name))) for edit in edits)

    def _layers_of(self, name: str) -> list[int]:
        layers = self.layers_with(name)
        # A model of attention alone has no MLP's sites: nothing is captured of them.
        if layers or name not in CROSS_SITES:
            return layers
        why = self.spec.refused.get("z", "no block attends to a source")
        raise Refused(f"{self.id} cannot give '{name}': {why}")

    def _length(self, run: Run) -> int:
        layer = run.cache.layers("resid_pre")
        if not layer:
            raise BadInput(
                'a replay starts from a clean run: model.run(batch, capture=["resid_pre"])'
            )
        return run.cache[Site("resid_pre", layer[0])].shape[1]

    def _plan(self, capture, edits: Sequence[Edit], statistics) -> Plan:
        plan = Plan()
        if not isinstance(capture, (str, Site, Iterable)):
            kind = "function" if callable(capture) else type(capture).__name__
            raise BadInput(f"capture is a list of sites, not a {kind}: capture=['z', 'pattern.3']")
        for text in [capture] if isinstance(capture, (str, Site)) else capture:
            site = Site.parse(text)
            layers = self._layers_of(site.name)
            if site.layer is not None and site.layer not in layers:
                if why := self.spec.refused.get(f"{site.name}.{site.layer}"):
                    raise Refused(f"{self.id} cannot give '{site}': {why}")
                raise BadInput(
                    f"no site '{site}' in {self.id}: layers are 0 to {self.n_layers - 1}"
                )
            if site.head is not None:
                block = self.spec.blocks[site.layer or 0]
                of = block.cross if site.name in CROSS_SITES else block
                assert of is not None  # one of `layers`
                n_heads = of.n_kv_heads if "n_kv_heads" in site.axes else of.n_heads
                if site.head >= n_heads:
                    raise BadInput(f"no site '{site}' in {self.id}: heads are 0 to {n_heads - 1}")
            for layer in layers if site.layer is None else [site.layer]:
                plan.capture.add((site.name, layer))
        for edit in Edit.several(edits):
            for layer in edit.layers(self._layers_of(edit.site.name)):
                plan.edits.setdefault((edit.site.name, layer), []).append(edit)
        if statistics:
            self.layers_with("pattern")
            moved = {
                name: _to_device(statistic, self.device) for name, statistic in statistics.items()
            }
            plan.statistics = RowStatistics(moved)
            plan.statistics_until = max(self.spec.attention_layers)
        return plan

    def _forward(
        self,
        batch: Batch,
        plan: Plan,
        *,
        stop_at: int | None,
        logits: bool | Tensor,
        grad: bool = False,
    ) -> Run:
        check_kept(logits, batch, has_tokens(self.module, batch))
        run = Run(batch, cache=Cache(self.device))
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad))
            self._hook(stack, run, plan, stop_at, grad)
            extra = {}
            if isinstance(logits, Tensor):
                if self._keeps_logits:
                    extra["logits_to_keep"] = logits.to(self.device)
            try:
                made = output_tensor(
                    call_model(self.module, batch, self.spec.first_position, **extra)
                )
                run.logits = by_row(made, self.spec.hidden_axes, batch.size)
                if isinstance(logits, Tensor) and not self._keeps_logits:
                    run.logits = run.logits[:, logits.to(run.logits.device)]
            except Stop:
                run.logits = None
        if plan.statistics is not None:
            run.statistics = plan.statistics.means(self.n_layers)
        return run

    def _hook(
        self, stack: ExitStack, run: Run, plan: Plan, stop_at: int | None, grad: bool
    ) -> None:
        """Put hooks on every module that a captured or edited site needs; `stack` takes them off."""

        def touch(name: str, layer: int, x: Tensor, start: int = 0) -> Tensor:
            for edit in plan.edits.get((name, layer), ()):
                x = edit(x, Seen(layer, start, run.batch.mask_of(name)))
            if (name, layer) in plan.capture:
                x = run.cache.put(name, layer, plan.kept(x))
            return x

        plan.grad = grad
        if stop_at == 0 and not plan.layers_of("embed", "resid_pre"):
            raise BadInput("stop_at=0 runs no block: nothing to capture")
        layouts = self._windows.of(run.batch)
        turns = Turns([block.name for block in self.spec.blocks]) if self.spec.shared else None
        if any(name in ATTENTION_SITES for name, _ in plan.sites) or plan.statistics is not None:
            places: dict[nn.Module, list[tuple[int, str, Part | None]]] = {}
            for layer, block in enumerate(self.spec.blocks):
                for name, prefix, part in attention_calls(block):
                    module = self.module.get_submodule(name)
                    places.setdefault(module, []).append((layer, prefix, part))
            next_call = {module: cycle(calls) for module, calls in places.items()}

            def watch(module: nn.Module) -> Watch:
                if module not in next_call:
                    return Watch()
                layer, prefix, part = next(next_call[module])
                watching = RunWatch(turns.now if turns else layer, plan, touch, run, prefix, part)
                place = self.spec.blocks[layer].axes, layouts.get(layer)
                return in_one_row(watching, module, *place, run.batch.size)

            stack.enter_context(window(self.module, watch))
        if turns:
            for name in turns.layers:
                enter = partial(lambda of, name, module, args: of.enter(name), turns, name)
                block = self.module.get_submodule(name)
                stack.callback(block.register_forward_pre_hook(enter).remove)
        for layer, (parts, where) in enumerate(zip(self.parts, self.spec.blocks, strict=True)):
            block = parts[0]
            if stop_at is not None and layer > stop_at:
                break
            on = partial(turns.only, layer) if turns else _as_it_is
            pre = BlockInput(
                *(layer, touch, plan, run, self.spec),
                stop=stop_at == layer,
                grad=grad and layer == 0,
            )
            if pre.needed:
                stack.callback(block.register_forward_pre_hook(on(pre), with_kwargs=True).remove)
            calls = CallsOnStream(where, self.spec.hidden)
            if where.repeated:
                begin = block.register_forward_pre_hook(on(calls.begin), with_kwargs=True)
                stack.callback(begin.remove)
            if where.W_out and plan.wants("mlp_post", layer):
                self._on_input(stack, where, calls, partial(touch, "mlp_post", layer), run, on)
            on_output = partial(self._on_output, stack, run, on, layouts.get(layer), where, calls)
            for name, module, factor in self._outputs(where):
                if plan.wants(name, layer):
                    on_output(module, write_change(name, layer, factor, touch))
            if where.before_mid and plan.wants("resid_mid", layer):
                self._on_middle(on_output, layer, where, touch, pre)
            last = stop_at == layer + 1 == self.n_layers
            post = BlockOutput(layer, touch, run, plan, where.axes, stop=last)
            if post.needed or self.spec.tuple_blocks:
                stack.callback(parts[-1].register_forward_hook(on(post)).remove)

    def _outputs(self, block: BlockMap) -> Iterator[tuple[str, str, float | Tensor]]:
        """(site, module, factor) of the sites that are a module's output times a factor."""
        cross = block.cross
        outs = [("attn_out", block.attn_out), ("mlp_out", block.mlp_out)]
        outs += [("cross_out", cross.out)] if cross else []
        for name, module in outs:
            if module is not None:
                yield name, module, 1.0
        writes = [("attn_write", block.attn_write), ("mlp_write", block.mlp_write)]
        writes += [("cross_write", cross.write)] if cross else []
        for name, write in writes:
            if write is not None:
                yield name, write.module, write.factor(self.module)

    def _on_middle(
        self, on_output: Callable[..., None], layer: int, where: BlockMap, touch, pre: BlockInput
    ) -> None:
        """Hooks for resid_mid: on the norm that returns it, or on the writes that make it."""
        if where.norm_mid is not None:
            on_output(where.norm_mid, write_change("resid_mid", layer, 1.0, touch))
            return
        factors = [write.factor(self.module) for write in where.before_mid]
        middle = Middle(layer, factors, touch, pre, where.carry_mid)
        if where.norm_pre is not None:
            on_output(where.norm_pre, middle.keep_normed)
        for write in where.before_mid[:-1]:
            on_output(write.module, middle.keep)
        on_output(where.before_mid[-1].module, middle.change)

    def _on_input(
        self,
        stack: ExitStack,
        block: BlockMap,
        calls: CallsOnStream,
        change: Callable[[Tensor], Tensor],
        run: Run,
        on,
    ) -> None:
        """Hook the input of W_out, seen as [batch pos width] even where the block flattened it."""

        def hook(module: nn.Module, args: tuple) -> Any:
            x = args[0]
            if not calls.has(block.W_out or "", x, change):
                return None
            new = change(shown_inside(x, block.axes, run.batch.size))
            return None if new is x else (held_inside(new, block.axes, x.shape), *args[1:])

        of = self.module.get_submodule(block.W_out or "")
        stack.callback(of.register_forward_pre_hook(on(hook)).remove)

    def _on_output(
        self,
        stack: ExitStack,
        run: Run,
        on,
        layout: Layout | None,
        block: BlockMap,
        calls: CallsOnStream,
        name: str,
        change: Callable[[Tensor], Tensor],
    ) -> None:
        """Hook a module's output, seen as [batch pos d_model] even where the block flattened or cut it."""

        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            x = first_tensor(output)
            assert x is not None
            if not calls.has(name, x, change):
                return None
            cut = layout is not None and layout.holds(name, x, run.batch.size)
            if layout is not None and cut:
                seen = layout.positions(x.flatten(1, -2))
            elif name in block.turned:
                seen = channels_last(x)
            else:
                seen = shown_inside(x, block.axes, run.batch.size)
            if name in self.spec.copies:  # the block changes this tensor in place later on
                seen = seen.clone()
            new = change(seen)
            if new is x or (new is seen and cut and not torch.is_grad_enabled()):
                return None
            # A view or a copy goes on in place of x, so that what is captured has a gradient; where
            # the block writes into it, it gets a copy of its own.
            new = new.clone() if name in self.spec.copies else new
            if layout is not None and cut:
                new = layout.windows(new, x.flatten(1, -2))
                return with_first(output, new.reshape(x.shape))
            if name in block.turned:
                return with_first(output, channels_first(new, x.shape))
            return with_first(output, held_inside(new, block.axes, x.shape))

        stack.callback(self.module.get_submodule(name).register_forward_hook(on(hook)).remove)


def _as_it_is(hook: Callable[..., Any]) -> Callable[..., Any]:
    return hook


def _part(joint: Run, batch: Batch, n: int, place: int) -> Run:
    """One of n variants' part of a joint run, each of this batch; a row may have several rows of logits."""
    rows, cache = slice(place * batch.size, (place + 1) * batch.size), Cache()
    for name in joint.cache:
        for layer, value in joint.cache.by_layer(name).items():
            cache.put(name, layer, value[rows])
    logits = None if joint.logits is None else joint.logits.tensor_split(n)[place]
    return Run(batch, logits, cache)


def _to_device(statistic: Statistic, device: torch.device) -> Statistic:
    return type(statistic)(
        *(getattr(statistic, name).to(device) for name in statistic.__dataclass_fields__)
    )
