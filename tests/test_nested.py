"""Passes of one model inside one another, and in several threads: none gets what another one changes by accident."""

from threading import Event, Thread

import pytest
import torch

from interp.models import one_thread
from interp.models.model import Model
from interp.run.edits import Edit
from tests.families import FAMILIES

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(FAMILIES["llama"]())


@pytest.mark.parametrize("site", ["z.0.1", "pattern.1.0", "v.1", "resid_post.0"])
def test_a_run_inside_a_hooked_model_has_its_edits_whatever_it_captures(
    model: Model, site: str
) -> None:
    outer, inner = Edit.scale(site, 0.3), Edit.scale("z.1", 2.0)
    wanted = model.run(IDS, ["z", "pattern"], edits=[outer, inner])
    with model.hooked(IDS, ["z"], edits=[outer]) as around:
        found = model.run(IDS, ["z", "pattern"], edits=[inner])
        plain = model.run(IDS).logits
    for name in ("z", "pattern"):
        torch.testing.assert_close(found.cache[name], wanted.cache[name])
    torch.testing.assert_close(found.logits, wanted.logits)
    torch.testing.assert_close(plain, model.run(IDS, edits=[outer]).logits)
    torch.testing.assert_close(around.cache["z"], model.run(IDS, ["z"], edits=[outer]).cache["z"])
    assert torch.equal(model.run(IDS).logits, model.run(IDS).logits)


def test_a_run_in_another_thread_waits_until_edits_are_gone(model: Model) -> None:
    clean = model.run(IDS, ["z"])
    inside, done, found = Event(), Event(), []

    def other() -> None:
        inside.wait()
        found.append(model.run(IDS, ["z"]))
        done.set()

    def zero(x: torch.Tensor, seen: object) -> torch.Tensor:
        inside.set()
        done.wait(0.3)  # the other one would be done here if it did not wait
        return torch.zeros_like(x)

    thread = Thread(target=other)
    thread.start()
    edited = model.run(IDS, edits=[Edit.apply("resid_post.0", zero), Edit.zero("z.1")])
    thread.join()
    torch.testing.assert_close(found[0].logits, clean.logits)
    torch.testing.assert_close(found[0].cache["z"], clean.cache["z"])
    alone = model.run(IDS, edits=[Edit.zero("resid_post.0"), Edit.zero("z.1")])
    torch.testing.assert_close(edited.logits, alone.logits)


def test_a_thread_that_waits_long_says_for_what(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(one_thread, "PATIENCE", 0.05)
    thread = Thread(target=lambda: model.run(IDS))
    with model.hooked(IDS, ["z"]):
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and "LlamaForCausalLM" in caplog.text
    thread.join()
