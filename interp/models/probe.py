"""Discover where a model's parts are from one probe forward, then verify it with identities.

Nothing here, in `discover` or in `verify` knows an architecture. What cannot be verified is refused by
name, with the reason.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from interp.errors import Refused
from interp.models.calls import call_model, output_tensor, text_config
from interp.models.discover import discover
from interp.models.recording import record
from interp.models.spec import Spec, module_device
from interp.models.verify import verify
from interp.run.batch import Batch

PROBE_ROWS, PROBE_LENGTH = 2, 7


def probe(module: nn.Module, batch: Batch | None = None) -> Spec:
    """The verified map of `module`.

    Args:
        module: a Hugging Face model in eval mode.
        batch: what to probe with; random tokens or pixels of the config's shape if not given.

    Raises:
        BadInput: the probe forward fails. Refused: no stack of blocks can be made out.
    """
    batch = (probe_batch(module) if batch is None else batch).to(module_device(module))
    with torch.no_grad():
        plain = output_tensor(call_model(module, batch))
        seen = record(module, batch)
        spec = discover(seen, batch)
        return verify(spec, seen, plain)


def probe_batch(module: nn.Module) -> Batch:
    """Random inputs of the kind the model takes."""
    config: Any = getattr(module, "config", None)
    kind = getattr(module, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(0)
    if kind == "pixel_values":
        config = getattr(config, "vision_config", config)
        size = (
            config.image_size
            if isinstance(config.image_size, (tuple, list))
            else [config.image_size] * 2
        )
        shape = (PROBE_ROWS, getattr(config, "num_channels", 3), *size)
        dtype = next(module.parameters()).dtype
        return Batch({"pixel_values": torch.randn(shape, generator=generator).to(dtype)})
    if kind != "input_ids" or config is None:
        raise Refused(
            f"{type(module).__name__} takes '{kind}' and only token and image models can be probed; "
            "pass its text or vision part"
        )
    d_vocab = text_config(module).vocab_size
    special = {
        value
        for key, value in text_config(module).to_dict().items()
        if key.endswith("token_id") and isinstance(value, int)
    }
    usable = torch.tensor([i for i in range(d_vocab) if i not in special] or [0])
    picks = torch.randint(len(usable), (PROBE_ROWS, PROBE_LENGTH), generator=generator)
    return Batch.of_ids(usable[picks])
