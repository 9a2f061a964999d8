"""Models that run on NDIF: captures and edits at module boundaries, traced there by nnsight.

Our attention function does not run on that machine, so what lies inside attention stays out of reach,
and weights do not leave it; `interp.nnsight.passes()` says what works and why the rest does not.

    model = interp.load(nnsight_model, remote=True)
    run = model.run("When Mary and John …", capture=["z", "resid_post.5"], edits=[Edit.zero("z.5.1")])
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from interp.errors import BadInput, Refused
from interp.models.calls import check_kept, parameters_of
from interp.models.model import Model
from interp.models.plan import Plan, planned
from interp.models.probe import probe_batch
from interp.models.sources.nnsight_model import is_nnsight
from interp.models.sources.pretrained import one_line, with_padding
from interp.models.spec import Check
from interp.nnsight import INSIDE_ATTENTION, PASSES, Addresses, mapped, name_of
from interp.run.batch import Batch
from interp.run.cache import Cache, Run
from interp.run.edits import Edit, Seen
from interp.sites import Site


class RemoteModel(Model):
    """A model whose `run` is traced on NDIF; see `interp.nnsight.passes` for what it can do.

    Its sites were found and verified on a narrow copy with random weights; `verify()` tries what can be
    tried on the weights that are served.

    Args:
        model: an nnsight model, dispatched or not. remote: True for NDIF, a host's URL, or "local" for
            nnsight's own simulation (serialised, deserialised without the user's modules, run here).

    Raises:
        BadInput: no key for NDIF. Refused: its sites cannot be found.
    """

    def __init__(self, model: Any, *, tokenizer: Any = None, remote: bool | str = True):
        if not is_nnsight(model) or not isinstance(getattr(model, "_module", None), nn.Module):
            raise BadInput(
                f"remote=True is for nnsight models, and this is a {type(model).__name__}: "
                "nnsight.TransformersModel('org/name', task='text-generation') makes one"
            )
        self.nnsight, self.remote = model, remote
        self.module, self.id = model._module, name_of(model)
        self.example = None
        self.tokenizer = with_padding(
            getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
        )
        self._check_key()
        spec, calls = mapped(model)
        inside = dict.fromkeys(("q", "k", "v", "scores", "pattern"), INSIDE_ATTENTION)
        self.spec = replace(spec, refused=inside | spec.refused)
        self.addresses = Addresses(self.spec, calls, self.id)
        self.notes = (
            "sites were found and verified on a copy with random weights, not on the served ones: "
            "model.verify() tries those",
        )

    @property
    def device(self) -> torch.device:
        """Where inputs are made and captures arrive: the CPU."""
        return torch.device("cpu")

    def run(  # type: ignore[override]
        self,
        data: Batch | Tensor | str | Sequence[str] | Mapping[str, Tensor],
        capture: Iterable[str | Site] = (),
        edits: Sequence[Edit] = (),
        *,
        logits: bool | Tensor = True,
        **refused: Any,
    ) -> Run:
        """One job: logits and captured activations, after edits, as `Model.run` gives them.

        Args:
            data, capture, edits: as in `Model.run`. logits: False stops after the last capture; a
                LongTensor of positions brings only these.

        Raises:
            BadInput: no key, no network, bad input. Refused: a site or edit that is not served.
        """
        if wanted := [name for name, value in refused.items() if value not in (None, False)]:
            self._refuse(f"run(..., {wanted[0]}=)")
        batch = self.as_batch(data)
        check_kept(logits, batch, tokens=True)
        plan = planned(self._offered, capture, edits)
        steps = self._steps(batch, plan)
        if not steps and logits is False:
            raise BadInput("nothing to do: name sites to capture, or ask for logits")
        self._check_reachable()
        positions = logits if isinstance(logits, Tensor) else None
        inputs = dict(batch.inputs)
        parameters = parameters_of(self.module)
        if "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"] + self.spec.first_position
        if "use_cache" in parameters:
            inputs["use_cache"] = False  # type: ignore[assignment]
        with torch.no_grad(), one_line(self.id):
            kept = _traced(self.nnsight, self.remote, inputs, steps, logits is not False, positions)
        run = Run(batch, kept.pop("logits", None))
        for key, value in kept.items():
            name, layer = key.split(".")
            run.cache.put(name, int(layer), value)
        for name, layer in plan.capture:
            if name == "resid_mid":
                parts = [kept[f"{part}.{layer}"] for part in self._summands(layer)]
                run.cache.put("resid_mid", layer, sum(parts[1:], parts[0]))
        wanted_sites = Cache()
        for name, layer in sorted(plan.capture):
            wanted_sites.put(name, layer, run.cache[Site(name, layer)])
        run.cache = wanted_sites
        return run

    def _steps(self, batch: Batch, plan: Plan) -> list[tuple]:
        """What to do at each module boundary, as plain numbers and tensors, in the order of the forward."""
        keep = set(plan.capture)
        for name, layer in plan.capture:
            if name == "resid_mid":
                keep |= {(part, layer) for part in self._summands(layer)}
        keep = {(name, layer) for name, layer in keep if name != "resid_mid"}
        found: dict[tuple[str, str], tuple[float, list]] = {}
        order = ("embed", "resid_pre", "attn_out", "attn_write", "mlp_out", "mlp_write")
        sites = keep | set(plan.edits)
        for name, layer in sorted(
            sites, key=lambda site: order.index(site[0]) if site[0] in order else -1
        ):
            if name == "resid_mid":
                self._refuse("edits of resid_mid")
            where = self.addresses[Site(name, layer)]
            rows, length = batch.size, batch.ids.shape[1]
            width = {"z": where.heads, "mlp_post": (self.spec.blocks[layer].d_mlp,)}
            width |= dict.fromkeys(
                ("attn_out", "mlp_out"), (self.spec.d_model // self.spec.n_streams,)
            )
            shape = (rows, length, *(width.get(name) or (self.spec.d_model,)))
            seen = Seen(layer, mask=batch.mask)
            changes = [_plain(edit, shape, seen) for edit in plan.edits.get((name, layer), ())]
            key = f"{name}.{layer}" if (name, layer) in keep else None
            _, ops = found.setdefault((where.path, where.side), (where.order, []))
            ops.append((key, where.scale, shape, changes))
        ordered = sorted(found.items(), key=lambda item: item[1][0])
        return [(path, side, ops) for (path, side), (_, ops) in ordered]

    def _summands(self, layer: int) -> tuple[str, str]:
        """The sites whose sum is resid_mid."""
        block = self.spec.blocks[layer]
        normed = block.norm_mid is not None or block.rescales
        if block.before_mid != (block.attn_write,) or normed:
            raise Refused(
                f"{self.id} cannot give 'resid_mid.{layer}' in a trace: it is not resid_pre plus attn_write"
            )
        return "resid_pre", "attn_write"

    def verify(self) -> list[Check]:
        """Identities of the residual stream on the weights that are served, in one small job.

        Blocks follow each other; attention and MLP writes sum to what a block adds. Relative errors in
        the dtype of the served model: 1e-2 allows for bfloat16.
        """
        sites = ["resid_pre", "resid_post"]
        additive = not self.spec.not_a_sum and not {"attn_write", "mlp_write"} & set(
            self.spec.refused
        )
        batch = probe_batch(self.module)
        run = self.run(batch, capture=sites + ["attn_write", "mlp_write"] * additive, logits=False)
        pre, post = run.cache["resid_pre"].float(), run.cache["resid_post"].float()
        stand = tuple(sites) if self.spec.chained else ()
        detail = "each block reads what the one before it returned"
        checks = [_check("stream", detail, pre[:, :, 1:], post[:, :, :-1], stand)]
        if additive:
            writes = ("attn_write", "mlp_write")
            written = sum((run.cache[name].float() for name in writes), pre)
            checks.append(
                _check("block writes", "each block adds its writes", written, post, writes)
            )
        return checks

    def _check_key(self) -> None:
        if self.remote is not True:
            return
        from nnsight import CONFIG

        if not CONFIG.API.APIKEY and CONFIG.API.HOST.rstrip("/").endswith("api.ndif.us"):
            raise BadInput(
                "NDIF needs a key and none is set: put it into the environment as NDIF_API_KEY, or call "
                "nnsight.CONFIG.set_default_api_key(...); interp.load(model) runs the model here"
            )

    def _check_reachable(self) -> None:
        """BadInput where nothing answers, before anything is sent."""
        if self.remote == "local":
            return
        from nnsight import CONFIG

        self._check_key()
        host = self.remote if isinstance(self.remote, str) else CONFIG.API.HOST
        parts = urlsplit(host)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname or host, port), timeout=10).close()
        except OSError as error:
            raise BadInput(
                f"nothing answers at {host} ({error}): check the network, or run the model here with "
                "interp.load(model)"
            ) from error

    def _refuse(self, what: str) -> Any:
        why = "; ".join(why for name, works, why in PASSES if not works and what in name)
        raise Refused(
            f"{self.id} runs remotely and cannot give {what}: "
            f"{why or 'interp.nnsight.passes() says what it can'}; interp.load(model) runs it here"
        )

    def replay(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a block cannot be called again on its own."""
        self._refuse("replay")

    def hooked(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: hooks of ours do not run there."""
        self._refuse("hooked")

    def W_O(self, layer: int, *, cross: int = 0) -> Tensor:
        """Refused: weights do not leave that machine."""
        return self._refuse("weights")

    def W_out(self, layer: int) -> Tensor:
        """Refused: weights do not leave that machine."""
        return self._refuse("weights")

    b_O, b_out, W_V = W_O, W_out, W_out  # noqa: N815

    def unembed(self, residual: Tensor) -> Tensor:
        """Refused: weights do not leave that machine."""
        return self._refuse("weights")

    @property
    def W_U(self) -> Tensor:
        """Refused: weights do not leave that machine."""
        return self._refuse("weights")

    W_E = final_norm = W_U  # type: ignore[assignment]


def _check(name: str, detail: str, ours: Tensor, theirs: Tensor, sites: tuple[str, ...]) -> Check:
    error = float((ours - theirs).abs().max() / theirs.abs().max()) if ours.numel() else 0.0
    return Check(name, error <= 1e-2, error, 1e-2, detail, sites)


def _plain(edit: Edit, shape: tuple[int, ...], seen: Seen) -> tuple[str, Any, Tensor | None]:
    """An edit as (what, number or tensor, where): code of ours does not travel."""
    kind, given = edit.kind, edit.given
    like = torch.zeros(()).expand(shape)
    where = edit.where(like, seen)
    ones = torch.ones(shape[:2], dtype=torch.bool) if seen.mask is None else seen.mask
    what: tuple[str, Any]
    if kind == "zero":
        what = ("set", torch.zeros(()))
    elif kind == "scale":
        what = ("scale", float(given))
    elif kind == "add":
        what = ("add", given.detach().cpu())
    elif kind == "patch":
        value = given[seen.layer] if isinstance(given, Mapping) else given
        what = ("set", value.detach().cpu())
    elif kind == "mean":
        what = ("mean", ones) if given is None else ("set", given[seen.layer].detach().cpu())
    elif kind == "resample":
        if shape[0] < 2:
            raise BadInput("resampling takes another row's activation: give at least two rows")
        what = ("rows", edit.change(torch.arange(shape[0]), seen))
    else:
        raise Refused(
            f"an edit of '{edit.site}' by a function of yours does not run remotely: use Edit.zero, "
            "scale, add, patch, mean or resample"
        )
    if what[0] == "set":
        edit.values(like, seen)  # whose shape is looked at here
    return what[0], what[1], None if where is None else where.cpu()


def _traced(
    model: Any,
    remote: bool | str,
    inputs: dict[str, Any],
    steps: list[tuple],
    logits: bool,
    positions: Tensor | None,
) -> dict[str, Tensor]:
    """The trace itself. Its body travels as source: it names nothing but torch, nnsight and plain data."""
    from nnsight import save

    with model.trace(**inputs, remote=remote) as tracer:
        kept = save({})
        for path, side, ops in steps:
            module = model.get(path)
            whole = module.input if side == "input" else module.output
            first = whole[0] if isinstance(whole, tuple) else whole
            changed = False
            new = first
            for key, scale, shape, changes in ops:
                x = new.reshape(shape) * scale
                for what, value, where in changes:
                    if what == "scale":
                        y = x * value
                    elif what == "add":
                        y = x + value.to(x)
                    elif what == "set":
                        y = value.to(x).expand_as(x)
                    elif what == "mean":
                        y = x[value.to(x.device)].mean(dim=0).expand_as(x)
                    else:
                        y = x[value.to(x.device)]
                    x = y if where is None else torch.where(where.to(x.device), y, x)
                    changed = True
                if key is not None:
                    kept[key] = x.detach().clone().cpu()
                new = (x / scale).reshape(first.shape)
            if changed:
                new = (new, *whole[1:]) if isinstance(whole, tuple) else new
                if side == "input":
                    module.input = new
                else:
                    module.output = new
        if logits:
            out = model.output
            found = out.logits if hasattr(out, "logits") else out[0]
            if positions is not None:
                found = found[:, positions.to(found.device)]
            kept["logits"] = found.detach().cpu()
        else:
            tracer.stop()
    return kept
