"""Model: a Hugging Face module, its verified map, and the two ways to call it: run and replay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from interp.errors import BadInput, Refused
from interp.models import exact, frames, kernels, replaced
from interp.models.calls import DRAWS, drawing
from interp.models.forwards import hooks_called
from interp.models.hooked import parts_of
from interp.models.inputs import faults_of_input
from interp.models.layout import require_tokens_alone
from interp.models.offered import Offered
from interp.models.one_thread import one_thread
from interp.models.passes import Passes
from interp.models.plan import planned
from interp.models.probe import probe, probe_batch
from interp.models.readout import unembed
from interp.models.replays import TOKENS_PER_FORWARD, replayed
from interp.models.spec import module_device
from interp.models.taken import batch_like, batch_of
from interp.models.tokens import Tokens
from interp.models.weights import FrozenNorm, Weights
from interp.run.batch import Batch
from interp.run.cache import Run
from interp.run.edits import Edit
from interp.run.statistics import Statistic
from interp.sites import Site

T = TypeVar("T")


class Model:
    """A Hugging Face model with named sites.

    Attributes:
        module: the module itself, unchanged. tokenizer: or None. id: the name shown in reports.
        spec: the verified map (`interp.models.spec.Spec`). notes: what loading had to say.

    Args:
        stack: of a model with several stacks of blocks, the one whose layers these are, by its name or that of
            the module around it. The whole model runs, and `run.logits` is what it returns first. A model's own,
            where it has one, is meant without.
        example: inputs by name on which the map is found, where none can be made up. See `interp.load`.

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
        stack: str | None = None,
        example: Mapping[str, Any] | None = None,
    ):
        self.module = module.eval()
        self.tokenizer = tokenizer
        self.notes = tuple(notes)
        before = replaced.kinds(self.module)
        self.example = None if example is None else batch_like(self.module, example)
        with one_thread(self.module):
            self.spec = probe(self.module, self.example, called=stack)
        self.id = f"{id}:{stack}" if self.spec.named else id
        self.notes += replaced.note(before, replaced.kinds(self.module))
        if self.module in drawing:
            self.notes += (DRAWS,)
        self.notes += kernels.note(self.module, self.spec.between_kernels)
        self.notes += exact.note(self.spec.in_float64)
        self.notes += frames.note(self.module, self.spec)
        spec = self.spec
        self.notes += tuple(note for note in (spec.unseen, spec.elsewhere, spec.unheard) if note)
        self._passes = Passes(self.module, self.spec)

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
            Refused: a layer is several modules called one after the other, in the model's own forward, or returns
                what is added there.
        """
        for block in self.spec.blocks:
            if block.adds:
                raise Refused(
                    f"blocks of {self.id}, which this calls by themselves, return what code outside adds to the "
                    "residual stream, not the stream; model.run with captures and edits, and model.replay, work"
                )
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
        return parts_of(self.module, self.spec)

    @property
    def probed(self) -> Batch:
        """Inputs that the map was found on: the example that was given, or what is made up for such a model."""
        made = probe_batch(self.module) if self.example is None else self.example
        return made.to(self.device)

    def layers_with(self, name: str) -> list[int]:
        """The layers that have the site called `name`; raises Refused with the reason if none."""
        return self._offered.layers_with(name)

    @property
    def _offered(self) -> Offered:
        return Offered(self.spec, self.id)

    # --- weights -------------------------------------------------------------------------------

    def W_O(self, layer: int, *, cross: int = 0) -> Tensor:
        """Output projection of a layer, one slice a head [n_heads d_head d_model].

        `cross`: that of its attention to a source, which maps cross_z to cross_out (True, or 1), or cross2_z to
        cross2_out (2).
        """
        return self._weights.attention_output(layer, cross)[0]

    def b_O(self, layer: int, *, cross: int = 0) -> Tensor:
        """Bias of a layer's output projection [d_model]; zeros where it has none."""
        return self._weights.attention_output(layer, cross)[1]

    def W_out(self, layer: int) -> Tensor:
        """What each neuron of a layer writes, before scale and norm [d_mlp d_model]."""
        return self._weights.mlp_output(layer)[0]

    def b_out(self, layer: int) -> Tensor:
        """Bias of the linear layer that reads a layer's neurons [d_model]; zeros where it has none."""
        return self._weights.mlp_output(layer)[1]

    def W_V(self, layer: int) -> Tensor:
        """Value projection of a layer, one slice a kv head [n_kv_heads d_model d_head].

        It reads the block's normed input; the norm's gain is folded in, so a residual vector divided
        by its norm's scale can be multiplied with it. Refused where v is not a linear map of that
        input (latent attention, shared values).
        """
        return self._weights.values(layer)

    @property
    def W_U(self) -> Tensor:
        """Unembedding [d_model d_vocab], without the final norm's gain (see `final_norm`)."""
        return self._weights.unembedding()

    @property
    def W_E(self) -> Tensor:
        """Token embedding [d_vocab d_model]."""
        return self._weights.embedding()

    @cached_property
    def final_norm(self) -> FrozenNorm:
        """The final norm, to be held fixed for direct attribution; the identity where there is none."""
        return self.norm(self.spec.final_norm)

    def norm(self, name: str | None) -> FrozenNorm:
        """The norm of the residual stream that the module called `name` is; the identity for None."""
        return self._weights.norm(name)

    def unembed(self, residual: Tensor) -> Tensor:
        """Logits [... d_vocab] of final residual vectors [... d_model], as the model makes them."""
        if not self.spec.readout:
            self._weights.require_unembedding()
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

    @property
    def _weights(self) -> Weights:
        return Weights(self.module, self._offered, self.device)

    # --- tokens --------------------------------------------------------------------------------

    def tokenize(
        self, prompts: str | Sequence[str], *, padding_side: str = "right", bos: bool | None = None
    ) -> Batch:
        """Token ids, mask and positions of texts; padded on either side to the same result.

        `bos=True` puts a BOS token first where the tokenizer did not, `bos=False` leaves it out;
        by default the tokenizer decides, as in Hugging Face. For an encoder-decoder the texts are
        sources: give `run` their inputs and "decoder_input_ids" besides.
        """
        return self._tokens.batch(prompts, padding_side=padding_side, bos=bos)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Each token's text, as it reads on its own; `#id` without a tokenizer."""
        return self._tokens.texts(ids)

    def token_id(self, token: str | int) -> int:
        """The id of one token, given as its text or its id.

        >>> tiny_model().token_id(3)
        3

        Raises:
            BadInput: an id outside the vocabulary; a text that is not one token (says how it splits).
        """
        return self._tokens.id_of(token)

    def as_batch(self, data: Batch | Tensor | str | Sequence[str] | Mapping[str, Any]) -> Batch:
        """Any accepted form of input as a checked Batch on the model's device."""
        batch = batch_of(data, self.module, self.spec, self._tokens, self.example)
        return batch.to(self.device)

    @property
    def _tokens(self) -> Tokens:
        return Tokens(self.tokenizer, self.id, self.spec.d_vocab or 0)

    # --- run and replay ------------------------------------------------------------------------

    def run(
        self,
        data: Batch | Tensor | str | Sequence[str] | Mapping[str, Any],
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
            data: text, token ids [batch pos], a Batch, or a mapping of model inputs. Ids with padding need
                their mask: `{"input_ids": ids, "attention_mask": mask}`. For an
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
        with faults_of_input(self.module, batch):
            self._passes.check(batch)
        plan = planned(self._offered, capture, edits, statistics, self.device)
        if stop_at is None and logits is False:
            stop_at = plan.last_layer + 1
        if stop_at is not None and not 0 <= stop_at <= self.n_layers:
            raise BadInput(f"stop_at={stop_at}: this model has {self.n_layers} blocks")
        with faults_of_input(self.module, batch):
            return self._passes.forward(batch, plan, stop_at=stop_at, logits=logits, grad=grad)

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
        self._passes.check(run.batch)
        return replayed(
            *(self._passes, self._offered, run, variants, metric),
            logits=logits,
            capture=capture,
            progress=progress,
            tokens_per_forward=tokens_per_forward,
        )

    @contextmanager
    def hooked(
        self,
        data: Batch | Tensor | str | Sequence[str] | Mapping[str, Any],
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
        self._passes.check(run.batch)
        plan = planned(self._offered, capture, edits)
        with ExitStack() as stack:
            stack.enter_context(hooks_called(self.module))
            stack.enter_context(self._passes.hooked(run, plan))
            if clean is not None:
                start = start if self.spec.chained else 0
                times = run.batch.size // clean.batch.size
                stack.enter_context(self._passes.resumed(clean, start, times))
            yield run
