"""The libraries side by side: importing ours changes no number of theirs, and imports none of them.

Each example runs twice in a fresh process, with nothing of ours and after `import interp`, a model opened
and run through our attention function. Both must print the same numbers, to the last bit.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import FAMILIES
from tests.ground_truth.induction_model import character_tokenizer

ROOT = Path(__file__).parent.parent

OURS = """
import torch, transformers, interp
model = interp.load(FOLDER)
run = model.run(torch.tensor([[5, 6, 7]]), capture=["z", "pattern", "resid_post"])
assert run.cache["z"].shape[2] == 3
"""

TRANSFORMER_LENS = """
import torch
from transformer_lens import TransformerBridge

bridge = TransformerBridge.boot_transformers(FOLDER, dtype=torch.float32, device="cpu")
with torch.no_grad():
    logits, cache = bridge.run_with_cache(torch.tensor([[5, 6, 7, 8]]))
show(logits, cache["pattern", 0], cache["resid_post", -1])
"""

NNSIGHT = """
import torch
from nnsight import TransformersModel
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = TransformersModel(
    FOLDER, task="text-generation", tokenizer=tokenizer, dtype=torch.float32, dispatch=True
)
with model.trace(torch.tensor([[5, 6, 7, 8]])):
    hidden = model.model.layers[1].output.save()
    logits = model.output.logits.save()
show(hidden, logits)
"""

HUGGING_FACE = """
import torch
from transformers import AutoModelForCausalLM

for kind in ("sdpa", "eager"):
    model = AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation=kind)
    with torch.no_grad():
        out = model(torch.tensor([[5, 6, 7, 8]]), output_hidden_states=True)
    show(out.logits, out.hidden_states[1])
    assert model.config._attn_implementation == kind
"""

SAE_LENS = """
import torch
from sae_lens import StandardSAE, StandardSAEConfig

torch.manual_seed(0)
sae = StandardSAE(StandardSAEConfig(d_in=8, d_sae=16))
show(sae(torch.randn(4, 8)))
"""

EXAMPLES = {
    "transformer_lens": TRANSFORMER_LENS,
    "nnsight": NNSIGHT,
    "transformers": HUGGING_FACE,
    "sae_lens": SAE_LENS,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-llama")
    FAMILIES["llama"]().save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


def numbers(folder: Path, code: str) -> list[Any]:
    """What `code` shows, run as a file of its own (nnsight reads the source of its traces)."""
    script = folder / f"example-{abs(hash(code))}.py"
    script.write_text(
        "import json\n"
        f"FOLDER = {str(folder)!r}\n"
        "def show(*tensors):\n"
        "    import torch\n"
        "    torch.set_printoptions(precision=9)\n"
        "    for x in tensors:\n"
        "        print('SHOWN', json.dumps([list(x.shape), x.detach().double().flatten().tolist()]))\n"
        + code
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [
        json.loads(line.removeprefix("SHOWN "))
        for line in done.stdout.splitlines()
        if line.startswith("SHOWN ")
    ]


@pytest.mark.parametrize("library", EXAMPLES)
def test_their_example_gives_the_same_numbers_after_ours(library: str, folder: Path) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    example = EXAMPLES[library]
    with ThreadPoolExecutor(2) as two:
        alone, beside = two.map(partial(numbers, folder), [example, OURS + example])
    assert alone and alone == beside
    assert all(torch.tensor(values).abs().max() > 0 for _, values in alone)


def test_ours_gives_the_same_numbers_after_theirs(folder: Path) -> None:
    """Imported last, with a bridge and nnsight's hooks in the process; and what ours leaves untouched.

    Registering our attention function leaves their functions and torch's switches as they were, and
    nothing of ours imports one of these libraries before it is asked for.
    """
    read = "\nshow(run.cache['z'], run.cache['pattern'], run.logits)\n"
    quiet = "def show(*tensors): pass\n"
    theirs = TRANSFORMER_LENS + NNSIGHT
    again = "\nfrom __main__ import shown as show\n"
    with ThreadPoolExecutor(2) as two:
        alone, last = two.map(
            partial(numbers, folder),
            [BEFORE + OURS + AFTER + read, f"shown = show\n{quiet}{theirs}{again}{OURS}{read}"],
        )
    assert alone and alone == last


BEFORE = """
import sys
import torch, transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

def state():
    return (
        dict(ALL_ATTENTION_FUNCTIONS.items()), dict(ALL_MASK_ATTENTION_FUNCTIONS.items()),
        torch.is_grad_enabled(), torch.get_default_dtype(), torch.initial_seed(),
        torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
    )

before = state()
"""
AFTER = """
after = state()
for was, now in zip(before[:2], after[:2]):
    assert {name: now[name] for name in was} == was
    assert set(now) - set(was) == {"interp_window", "interp_window_flash"}
assert before[2:] == after[2:]
found = {"transformer_lens", "nnsight", "sae_lens"} & set(sys.modules)
assert not found, found
"""
