"""A Model under TransformerLens' names: its weights in their layout, its runs as their ActivationCache.

What TransformerLens code asks of a model or a cache (`W_Q`, `blocks[3].attn.W_O`, `run_with_cache`,
`cache["pattern", 0]`, `cache.decompose_resid()`) is answered from the Hugging Face module and our
capture, so that their tools and notebooks run on any model that opens here. TransformerLens itself is
imported when a cache is made.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, overload

import torch
from jaxtyping import Int
from torch import Tensor

from interp.errors import BadInput, Refused
from interp.models.model import Model
from interp.run.batch import Batch
from interp.run.cache import Cache, Run
from interp.run.edits import Edit, Seen
from interp.sites import AXES, Site, by_query, ranges, to_transformer_lens
from interp.transformer_lens_elsewhere import missing_attribute, refuse_options
from interp.transformer_lens_parts import HookPoint
from interp.transformer_lens_weights import Weights

if TYPE_CHECKING:
    from transformer_lens import ActivationCache

Names = str | Iterable[str] | Callable[[str], bool] | None
Returned = Tensor | tuple[Tensor, Tensor] | None
"""Logits, the loss, both, or nothing, as `return_type` says."""


def view(model: Model) -> View:
    """The model with TransformerLens' attributes and methods.

    >>> lens = view(tiny_model())
    >>> lens.W_Q.shape, lens.W_K.shape, lens.cfg.n_heads
    (torch.Size([2, 4, 32, 8]), torch.Size([2, 2, 32, 8]), 4)
    >>> logits, cache = lens.run_with_cache(torch.tensor([[5, 6, 7]]))
    >>> cache["pattern", 0].shape, cache["resid_post", -1].shape
    (torch.Size([1, 4, 3, 3]), torch.Size([1, 3, 32]))
    """
    return View(model)


def activation_cache(cache: Cache, model: Model | View | None = None) -> ActivationCache:
    """TransformerLens' own ActivationCache over what was captured; no tensor is copied.

    Every captured site appears under its classic name and the bridge's: `z` of layer 5 is
    "blocks.5.attn.hook_z" and "blocks.5.attn.o.hook_in". `q` and `k` are `hook_rot_q` and `hook_rot_k`
    (after rotary positions), with `model` also `hook_q` and `hook_k` where nothing stands between the
    projections and attention (GPT-2). `hook_embed` is the input of the first block, learned positions included.

    Args:
        cache: of a run.
        model: gives the cache's own methods what they need (weights, norm scales, token ids); without
            one the cache can be indexed and stacked, and its last layer is the last one captured.

    Returns:
        `transformer_lens.ActivationCache`: ("pattern", 0) is [batch head query key], ("z", 5)
        [batch pos head d_head], ("resid_post", -1) [batch pos d_model]; `accumulated_resid`,
        `decompose_resid`, `stack_head_results`, `logit_attrs` … are theirs.
    """
    from transformer_lens import ActivationCache

    stored = {(name, layer): x for name in cache for layer, x in cache.by_layer(name).items()}
    named = _Named(
        (hook, x)
        for (name, layer), x in stored.items()
        for hook in to_transformer_lens(Site(name, layer))
    )
    if model is None:
        n_layers = 1 + max((layer for _, layer in stored), default=-1)
        return ActivationCache(named, SimpleNamespace(cfg=SimpleNamespace(n_layers=n_layers)))
    lens = model if isinstance(model, View) else View(model)
    if any(name in ("q", "k") for name, _ in stored) and _as_projected(lens):
        before = {name.replace("hook_rot_", "hook_"): x for name, x in named.items()}
        named.update((name, x) for name, x in before.items() if name.endswith(("hook_q", "hook_k")))
    for layer in sorted({*cache.layers("resid_pre"), *cache.layers("resid_mid")}):
        for hook, norm_of in (("ln1", lens.norm_before_attention), ("ln2", lens.norm_before_mlp)):
            norm = norm_of(layer)
            if norm is not None and (norm[1], layer) in stored:
                scale = norm[0].scale(stored[norm[1], layer])
                named[f"blocks.{layer}.{hook}.hook_scale"] = scale
    last = lens.model.n_layers - 1
    if ("resid_post", last) in stored and lens.cfg.normalization_type is not None:
        named["ln_final.hook_scale"] = lens.model.final_norm.scale(stored["resid_post", last])
    return ActivationCache(named, lens)


def _as_projected(lens: View) -> bool:
    try:
        return lens.projections.as_projected
    except Refused:  # where projections are not found, nothing says that q and k are these
        return False


class NotCaptured(BadInput, KeyError):
    """A cache has no activation of this name; a KeyError too, as TransformerLens code expects."""

    __str__ = Exception.__str__


class _Named(dict[str, Tensor]):
    """Activations by hook name; of what was not captured it is told which site captures it."""

    def __missing__(self, name: str) -> Tensor:
        sites = list(
            dict.fromkeys(key.removeprefix("blocks.").lstrip("0123456789.") for key in self)
        )
        captured = f"captured: {', '.join(sites) or 'nothing'}"
        try:
            site = Site.parse(name)
        except BadInput as error:
            if "hook_" in name and not str(error).startswith("no site"):
                raise NotCaptured(f"{error}; {captured}") from None
            near = difflib.get_close_matches(name, self, n=3)
            meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else ";"
            raise NotCaptured(f"this cache has no '{name}'{meant} {captured}") from None
        alike = re.compile(re.escape(name).replace(f"blocks\\.{site.layer}\\.", r"blocks\.(\d+)\."))
        layers = sorted(int(found[1]) for key in self if (found := alike.fullmatch(key)))
        if site.layer is not None and layers:
            raise NotCaptured(
                f"'{name}' was not captured: of '{site.name}' there are layers {ranges(layers)}; {captured}"
            )
        raise NotCaptured(
            f"'{name}' was not captured; write model.run(…, capture=['{site.name}']); {captured}"
        )


class View(Weights):
    """TransformerLens' attributes and methods of a Model, its weights among them; see `view`."""

    def __init__(self, model: Model):
        super().__init__(model)
        self.tokenizer = model.tokenizer

    if not TYPE_CHECKING:  # checkers shall go on finding misspelled names

        def __getattr__(self, name: str) -> Any:
            raise missing_attribute(self, name, View)

    # --- tokens ------------------------------------------------------------------------------------

    def to_tokens(
        self,
        text: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> Int[Tensor, "batch pos"]:
        """Token ids, padded on the tokenizer's side; BOS comes first where TransformerLens puts it (not in NeoX …).

        Ids alone do not tell their padding: pass prompts of several lengths to the model as texts.
        """
        return self._tokenized(text, prepend_bos, padding_side).ids.to(self.model.device)

    def _tokenized(
        self, text: str | Sequence[str], prepend_bos: bool | None, padding_side: str | None
    ) -> Batch:
        bos = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        if self.tokenizer is not None and self.tokenizer.bos_token_id is None:
            bos = None
        side = padding_side or getattr(self.tokenizer, "padding_side", "right")
        return self.model.tokenize(text, padding_side=side, bos=bos)

    def to_string(
        self, tokens: Tensor | Sequence[int] | Sequence[Sequence[int]]
    ) -> str | list[str]:
        """The text of token ids [pos], or one text a row of [batch pos]."""
        tokens = torch.as_tensor(tokens)
        if self.tokenizer is None:
            raise BadInput(f"{self.model.id} was loaded without a tokenizer: load with tokenizer=")
        if tokens.ndim == 2:
            return self.tokenizer.batch_decode(tokens, clean_up_tokenization_spaces=False)
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    @overload
    def to_str_tokens(self, text: str | Tensor, prepend_bos: bool | None = None) -> list[str]: ...
    @overload
    def to_str_tokens(
        self, text: Sequence[str], prepend_bos: bool | None = None
    ) -> list[list[str]]: ...
    def to_str_tokens(
        self, text: str | Tensor | Sequence[str], prepend_bos: bool | None = None
    ) -> list[str] | list[list[str]]:
        """Each token's text; of several texts, a list each."""
        if not isinstance(text, (str, Tensor)):
            return [self.to_str_tokens(each, prepend_bos) for each in text]
        ids = self.to_tokens(text, prepend_bos) if isinstance(text, str) else text
        if ids.ndim > 1 and len(ids) > 1:
            raise BadInput(f"{len(ids)} rows of ids: pass one of them, as to_str_tokens(ids[0])")
        return self.model.tokens(ids.reshape(-1).tolist())

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token; BadInput, with its parts, where it is not."""
        return self.model.token_id(text)

    def to_single_str_token(self, token: int) -> str:
        """The text of one token id."""
        return self.model.tokens([int(token)])[0]

    def get_token_position(
        self,
        token: str | int,
        input: str | Tensor,
        mode: str = "first",
        prepend_bos: bool | None = None,
    ) -> int:
        """Where a token stands in a text or in ids [pos], BOS counted: its "first" place, or its "last"."""
        if mode not in ("first", "last"):
            raise BadInput(f"mode {mode!r} is neither 'first' nor 'last'")
        wanted = self.to_single_token(token) if isinstance(token, str) else int(token)
        ids = self.to_tokens(input, prepend_bos) if isinstance(input, str) else input
        places = (ids.reshape(-1) == wanted).nonzero()[:, 0].tolist()
        if not places:
            raise BadInput(f"token {token!r} is not in the input: {self.to_str_tokens(ids)}")
        return places[0 if mode == "first" else -1]

    @property
    def all_head_labels(self) -> list[str]:
        """ "L0H0", "L0H1" … in the order of the flattened axes [n_layers n_heads]."""
        return [f"L{layer}H{head}" for layer, head in self.model.spec.heads]

    # --- runs --------------------------------------------------------------------------------------

    def hook_names(self) -> list[str]:
        """The classic names that this model has, in the order of the forward pass."""
        names = ["hook_embed"]
        for layer in range(self.model.n_layers):
            for name in AXES:
                if name == "embed" or name in self.model.spec.refused:
                    continue
                if layer in self.model.layers_with(name):
                    names += to_transformer_lens(Site(name, layer))[:1]
        return names

    @torch.no_grad()
    def run_with_cache(
        self,
        input: str | Sequence[str] | Tensor,
        names_filter: Names = None,
        *,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        remove_batch_dim: bool = False,
        **theirs: Any,
    ) -> tuple[Returned, ActivationCache]:
        """(logits, cache): every site of the model, or those whose names pass `names_filter`.

        Caching everything takes memory: name what is needed. Texts of several lengths are padded, and real
        positions are as if each text were alone; what stands at padding means nothing, and the loss leaves it
        out on either side (theirs counts padding on the right of causal models).
        """
        refuse_options("run_with_cache", theirs, "names_filter, return_type, remove_batch_dim …")
        names = self._chosen(names_filter)
        run = self.model.run(
            self._given(input, prepend_bos, padding_side),
            capture=names,
            logits=return_type is not None,
        )
        cache = activation_cache(run.cache, self)
        if remove_batch_dim:
            cache.remove_batch_dim()
        return self._returned(run, return_type, loss_per_token), cache

    @torch.no_grad()
    def run_with_hooks(
        self,
        input: str | Sequence[str] | Tensor,
        fwd_hooks: Sequence[tuple[Names, Callable[..., Tensor | None]]] = (),
        *,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        **theirs: Any,
    ) -> Returned:
        """Logits (or "loss", or "both") with `hook_fn(activation, hook=…)` applied at each named place.

        A hook returns the new activation, or changes the one it is given in place. `hook.name` and
        `hook.layer()` are set. Padding is as in `run_with_cache`.
        """
        refuse_options("run_with_hooks", theirs, "fwd_hooks, return_type, prepend_bos …")
        edits = [
            self._as_edit(name, function)
            for names, function in fwd_hooks
            for name in self._chosen(names)
        ]
        run = self.model.run(self._given(input, prepend_bos, padding_side), edits=edits)
        return self._returned(run, return_type, loss_per_token)

    def __call__(
        self,
        input: str | Sequence[str] | Tensor,
        return_type: str | None = "logits",
        *,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        loss_per_token: bool = False,
        **theirs: Any,
    ) -> Returned:
        """Logits [batch pos d_vocab], with "loss" the mean next-token loss in nats, or "both"."""
        return self.run_with_hooks(
            input,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            return_type=return_type,
            loss_per_token=loss_per_token,
            **theirs,
        )

    def _given(
        self, input: Any, prepend_bos: bool | None, padding_side: str | None
    ) -> Tensor | Batch:
        if isinstance(input, Tensor):
            return input if input.ndim == 2 else input[None]
        return self._tokenized(input, prepend_bos, padding_side)

    def _chosen(self, names: Names) -> list[str]:
        if isinstance(names, str):
            return [names]
        if names is None or callable(names):
            return [name for name in self.hook_names() if names is None or names(name)]
        return list(names)

    def _as_edit(self, name: str, function: Callable[..., Tensor | None]) -> Edit:
        site = Site.parse(name)

        def change(x: Tensor, seen: Seen) -> Tensor:
            if by_query(site.name) and (seen.start or x.shape[2] != x.shape[3]):
                raise BadInput(
                    f"'{name}' of a prompt this long comes in chunks of query rows: use Edit.apply, "
                    "whose function is told the first row"
                )
            new = function(x, hook=HookPoint(name, seen.layer))
            return x if new is None else new  # which it may have changed in place

        return Edit.apply(site, change)

    @staticmethod
    def _returned(run: Run, kind: str | None, per_token: bool) -> Returned:
        """The loss is 0 where a token or the one before it is padding, and its mean is over the others."""
        if kind not in ("logits", "loss", "both", None):
            raise BadInput(f"return_type {kind!r} is none of 'logits', 'loss', 'both', None")
        logits, ids = run.logits, run.batch.inputs.get("input_ids")
        if kind not in ("loss", "both") or logits is None or ids is None:
            return logits if kind else None
        log_probs = logits[:, :-1].float().log_softmax(-1)
        loss = -log_probs.gather(-1, ids[:, 1:, None].to(logits.device))[..., 0]  # [batch pos-1]
        real = run.batch.inputs.get("attention_mask", torch.ones_like(ids)).bool().to(loss.device)
        real = real[:, :-1] & real[:, 1:]
        loss = loss.where(real, 0) if per_token else loss[real].mean()
        return loss if kind == "loss" else (logits, loss)
