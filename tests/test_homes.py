"""Names asked of a package: nouns, its modules, and where everything else is."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import circuits
import interp
import probes


@pytest.mark.parametrize(
    ("package", "name", "hint"),
    [
        (circuits, "patch", "from circuits.patching import patch"),
        (interp, "logit_lens", "from interp.lens import logit_lens"),
        (probes, "logit_diff", "from interp.metrics import logit_diff"),
        (probes, "linear_probe", "did you mean 'linear_probes'?"),
        (interp, "from_pretrained", "interp.load(name)"),
        (circuits, "xyzzy", "dir(circuits) lists what it has"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_name_that_lives_elsewhere_is_answered_with_its_import(package, name, hint) -> None:
    with pytest.raises(AttributeError) as error:
        getattr(package, name)
    assert str(error.value).startswith(f"module '{package.__name__}' has no attribute '{name}'; ")
    assert hint in str(error.value)
    if "import" in hint:
        module = importlib.import_module(hint.split()[1])
        assert callable(getattr(module, name))


def test_modules_are_there_without_being_imported_first_and_torch_waits() -> None:
    script = """
import sys
import circuits, interp, probes
assert not {"torch", "transformers"} & set(sys.modules)
assert {"classify_heads", "patching", "tasks"} <= set(dir(circuits)), dir(circuits)
assert "TYPE_CHECKING" not in dir(interp) and "__main__" not in dir(interp)
assert not hasattr(interp, "__wrapped__")
assert interp.metrics.logit_diff and probes.controls.control_labels
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
