"""Passes of a model: its forward under a plan, whole or up to a block, and from a block on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from interp.errors import Refused
from interp.models.calls import call_model, check_kept, has_tokens, output_tensor, parameters_of
from interp.models.frames import require_one_frame
from interp.models.hooked import hooked
from interp.models.hooks import Stop
from interp.models.one_thread import one_thread
from interp.models.packed import by_row
from interp.models.plan import Plan
from interp.models.skipping import skipping
from interp.models.spec import Spec, module_device
from interp.models.windows import Layouts
from interp.run.batch import Batch
from interp.run.cache import Cache, Run
from interp.sites import Site


class Passes:
    """What carries out plans on a module, given its verified map."""

    def __init__(self, module: nn.Module, spec: Spec):
        self.module, self.spec = module, spec
        self._windows = Layouts(module, spec)
        # Positions are an index into the last hidden state, which may lie on another device than they.
        self._keeps_logits = (
            "logits_to_keep" in parameters_of(module)
            and len({parameter.device for parameter in module.parameters()}) == 1
        )

    def check(self, batch: Batch) -> None:
        """Raises what cannot be seen of inputs of this shape, before anything is planned (see `Layouts.of`)."""
        require_one_frame(self.module, batch)
        self._windows.of(batch)

    @contextmanager
    def hooked(
        self, run: Run, plan: Plan, *, stop_at: int | None = None, grad: bool = False
    ) -> Iterator[None]:
        """Inside, a forward on the batch of `run` carries out the plan (see `hooked.hooked`); other threads wait."""
        layouts = self._windows.of(run.batch)
        with (
            one_thread(self.module),
            hooked(self.module, self.spec, layouts, run, plan, stop_at=stop_at, grad=grad),
        ):
            yield

    def forward(
        self,
        batch: Batch,
        plan: Plan,
        *,
        stop_at: int | None = None,
        logits: bool | Tensor = True,
        grad: bool = False,
        start: int = 0,
    ) -> Run:
        """One forward under the plan; `stop_at`, `logits` and `grad` as in `Model.run`.

        `start`: the first layer that is computed, where those before are skipped (`resumed`).
        """
        check_kept(logits, batch, has_tokens(self.module, batch))
        run = Run(batch, cache=Cache(module_device(self.module)))
        with torch.set_grad_enabled(grad), self.hooked(run, plan, stop_at=stop_at, grad=grad):
            extra = {}
            if isinstance(logits, Tensor):
                if self._keeps_logits:
                    extra["logits_to_keep"] = logits.to(module_device(self.module))
            try:
                made = output_tensor(
                    call_model(self.module, batch, self.spec.first_position, **extra)
                )
                if grad and made.is_inference():
                    raise Refused(
                        "gradients cannot be had of this model: its forward runs in torch.inference_mode(), which "
                        "keeps no graph; runs without grad=True work"
                    )
                run.logits = by_row(made, self.spec.hidden_axes, batch.size)
                if isinstance(logits, Tensor) and not self._keeps_logits:
                    run.logits = run.logits[:, logits.to(run.logits.device)]
            except Stop:
                run.logits = None
        plan.require_met(start, self.spec.n_layers if stop_at is None else stop_at)
        if plan.statistics is not None:
            run.statistics = plan.statistics.means(self.spec.n_layers)
        return run

    @contextmanager
    def resumed(self, clean: Run, start: int, times: int) -> Iterator[None]:
        """Inside, blocks before `start` are not computed again, on `times` copies of the batch of a clean run."""
        resid = clean.cache[Site("resid_pre", start)].repeat(times, 1, 1)
        with one_thread(self.module), skipping(self.module, self.spec, start, resid, clean, times):
            yield
