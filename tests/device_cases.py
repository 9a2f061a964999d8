"""Nothing assumes the CPU: every analysis runs on another device and finds what it finds on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points

import pandas as pd
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

import circuits
from circuits.heads.detector import catalogue
from interp.errors import BadInput
from interp.generate import generate
from interp.models.model import Model
from interp.models.probe import probe
from interp.registry import ANALYSES
from interp.report import Report
from interp.run.edits import Edit
from probes.saes.model import SAE, SAEConfig
from probes.saes.splice import splice
from tests.contracts.test_analyses import ARGUMENTS, PROMPT
from tests.families import FAMILIES
from tests.ground_truth.induction_model import character_tokenizer, induction_model
from tests.other_device import Other, other_device

for _entry in entry_points(group="interp.analyses"):
    _entry.load()
NAMES = sorted(name for name, analysis in ANALYSES.items() if analysis.reads == "model")


DIFFERENTIATES = {
    "circuit_evaluate", "circuit_find", "circuit_overlap", "decompose", "duo_attention", "edges",
    "explain", "flow", "ioi_roles", "path_patch", "probe_causal", "readout", "recall", "tune_lens",
    "vector_task", "words",
}  # fmt: skip
"""Gradients of the simulated device run on its index 0 alone (torch has no hook for more): between it and the CPU."""
CLOSE = {"rtol": 1e-3, "atol": 1e-5}
"""The same kernels; closed-form lenses are solved from products that rounding moves by far more than eps."""


@pytest.fixture(scope="module")
def here() -> Model:
    return Model(module(), character_tokenizer())


@pytest.fixture(scope="module")
def moved() -> Model:
    with other_device(like_mps=True):
        return Model(module().to("other"), character_tokenizer())


@pytest.fixture
def there(moved: Model) -> Iterator[Model]:
    """On one device without float64 and without the kernels that MPS lacks."""
    with other_device(like_mps=True):
        yield moved


def parted(first: str, second: str) -> Model:
    """Block 0 on one device, block 1 and the end on another, as `device_map="auto"` does."""
    made = module()
    on_second = ("transformer.h.1", "transformer.ln_f", "lm_head")
    on_first = ("transformer.wte", "transformer.wpe", "transformer.h.0")
    for place, names in ((first, on_first), (second, on_second)):
        for name in names:
            part = made.get_submodule(name).to(place)
            hook = AlignDevicesHook(torch.device(place), place_submodules=False)
            add_hook_to_module(part, hook)
    add_hook_to_module(made, AlignDevicesHook(torch.device(first), io_same_device=True))
    return Model(made, character_tokenizer())


@pytest.fixture(scope="module")
def spreads() -> dict[bool, Model]:
    """On two devices; those that gradients cross are the first and the CPU."""
    with other_device():
        return {False: parted("other:0", "other:1"), True: parted("other:0", "cpu")}


@cache
def report_of(name: str, model: Model) -> Report:
    """What an analysis finds on a model, found once."""
    positional, options = ARGUMENTS.get(name, ((PROMPT,), {}))
    return ANALYSES[name].function(model, *positional, **options)


def same_tables(theirs: Report, mine: Report) -> None:
    """The same rows, whatever the order of those that tie."""
    assert mine.tables.keys() == theirs.tables.keys()
    for name, frame in mine.tables.items():
        exact = [c for c in frame.columns if frame[c].dtype.kind not in "fc"]
        both = (t.sort_values(exact, ignore_index=True) for t in (theirs.tables[name], frame))
        pd.testing.assert_frame_equal(*both, **CLOSE)


def module() -> torch.nn.Module:
    """The hand-built model, moved off the ties that its zeros make."""
    made, generator = induction_model(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return made


def test_the_device_is_one_that_does_not_mix() -> None:
    with other_device():
        x = torch.ones(3, device="other")
        assert isinstance(x, Other) and str(x.device) == "other:0" and x.sum().item() == 3
        assert type(x.cpu()) is torch.Tensor
        with pytest.raises(RuntimeError, match="several devices"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="several devices"):
            x + torch.ones(3, device="other:1")
        with pytest.raises(RuntimeError, match="generator of the CPU"):
            torch.rand(3, device="other", generator=torch.Generator())
        with pytest.raises(TypeError, match="no numpy view"):
            x.numpy()
        assert x.double().dtype == torch.float64


def test_the_device_can_lack_what_mps_lacks() -> None:
    with other_device(like_mps=True):
        x = torch.ones(2, 2, device="other")
        assert (2.0 * x + torch.tensor(1.0, dtype=torch.float64)).dtype == torch.float32
        assert x.cpu().double().dtype == torch.float64
        for widened in (
            lambda: x.double(),
            lambda: x.to("cpu", torch.float64),
            lambda: x.sum(dtype=torch.float64),
            lambda: torch.ones(2, dtype=torch.float64).to("other"),
            lambda: torch.zeros(2, dtype=torch.float64, device="other"),
            lambda: torch.zeros(2, 2, dtype=torch.float64).copy_(x),
        ):
            with pytest.raises(TypeError, match="float64"):
                widened()
        with pytest.raises(NotImplementedError, match="not implemented"):
            torch.linalg.eigvals(x)


def test_a_run_is_there_and_the_same(here: Model, there: Model) -> None:
    sites = ["z", "pattern", "resid_post"]
    edits = [Edit.mean("z", heads=[(0, 1)])]
    mine, theirs = (model.run(PROMPT, capture=sites, edits=edits) for model in (here, there))
    assert theirs.logits is not None and str(theirs.logits.device) == "other:0"
    assert torch.equal(theirs.logits.cpu(), mine.logits)
    for site in sites:
        assert torch.equal(theirs.cache[site].cpu(), mine.cache[site])


@pytest.mark.parametrize("name", NAMES)
def test_an_analysis_is_the_same_there(name: str, here: Model, there: Model) -> None:
    same_tables(report_of(name, there), report_of(name, here))


@pytest.mark.parametrize("name", NAMES)
def test_an_analysis_is_the_same_on_two_devices(name: str, here: Model, spreads: dict) -> None:
    mine = report_of(name, here)
    with other_device():
        same_tables(report_of(name, spreads[name in DIFFERENTIATES]), mine)


@pytest.mark.parametrize("name", [d.name for d in catalogue() if d.slow])
def test_a_slow_detector_is_the_same_there(name: str, here: Model, there: Model) -> None:
    options = {"detectors": [name], "prompts": 4, "ablate": False, "evidence": 0, "progress": False}
    mine, theirs = (circuits.classify_heads(m, **options) for m in (here, there))
    pd.testing.assert_frame_equal(theirs.table, mine.table, **CLOSE)


def test_text_is_written_there(here: Model, there: Model) -> None:
    edits = [Edit.zero("z", heads=[(0, 2)])]
    mine, theirs = (generate(m, PROMPT, max_new_tokens=5, edits=edits) for m in (here, there))
    assert theirs.texts == mine.texts


def test_an_autoencoder_elsewhere_is_told(there: Model) -> None:
    width = there.spec.d_model
    coder = SAE(SAEConfig(d_in=width, d_sae=8, k=2, site="resid_post.0"))
    with pytest.raises(BadInput, match=r"is on cpu.*sae.to\(model.device\)"):
        splice(coder, there)


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if "MoE" not in f.traits])
def test_a_family_is_seen_there_as_here(name: str) -> None:
    """Without experts: off the CPU they use a kernel for whole numbers that the CPU has not got."""
    with other_device():
        assert set(probe(FAMILIES[name]().to("other")).refused) == FAMILIES[name].refused
