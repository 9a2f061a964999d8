"""`interp.load`: any checkpoint, opened, probed and verified."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from interp.errors import BadInput
from interp.models.load import load_checkpoint
from interp.models.model import Model
from interp.models.towers import image_part

if TYPE_CHECKING:
    import torch
    from torch import nn


def load(
    source: str | PathLike[str] | nn.Module | Any = "smollm2-135m",
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    stack: str | None = None,
    example: Mapping[str, Any] | None = None,
    remote: bool | str = False,
) -> Model:
    """A Model from the embedded default, a hub id, a folder, a .gguf file, or a live model.

    Args:
        source: "smollm2-135m", "org/name", a path, or a live model: an nn.Module (which is used as it
            is), a TransformerLens TransformerBridge (opened as the Hugging Face model it wraps, with
            the bridge's own parameters), an nnsight TransformersModel (likewise; a lazy one loads its
            weights).
        tokenizer: for a live module; elsewhere it comes with the checkpoint.
        device, dtype, device_map, revision: passed to the Hugging Face loaders.
        trust_remote_code: run code that a checkpoint brings; off unless you ask.
        stack: of a model with several stacks of blocks, the one to open, by its name or that of the module around
            it ("text_model"); the whole model runs. A refusal and `model.spec.stack` name stacks.
        example: inputs of the model's own forward by name, on which its map is found; for forwards whose inputs nothing
            can make up, `example={"inference_session": session, "frame_idx": 1}` of a video tracker, say. `model.run`
            takes such a mapping too. What is no tensor (an object with a state, a number, a list) is copied for every
            forward: all see the same state, and yours stays as it is. Of an example of one row how several lie beside
            one another is not tried, and batches of several are refused; one with an input that is no tensor has one
            row, unless its token ids or its main input are a tensor.
        remote: for an nnsight model: run it on NDIF (True), on the nnsight host of this URL, or in
            nnsight's simulation of that ("local"); see `interp.remote.RemoteModel`.

    Raises:
        BadInput: no such model, damaged or missing weights, NaN in them; its forward fails on the example; no key for
            NDIF. Refused: nothing in the model can be addressed.
    """
    if remote:
        from interp.remote import RemoteModel

        given = {"device": device, "dtype": dtype, "device_map": device_map, "revision": revision}
        if stack is not None:
            raise BadInput(
                "stack was given with remote=True: only a model that runs here has a named stack"
            )
        if example is not None:
            raise BadInput(
                "example was given with remote=True: only a model that runs here is probed on it"
            )
        if named := [name for name, value in given.items() if value is not None]:
            raise BadInput(
                f"{named[0]} was given with remote=True: the model is where it is served; leave it out"
            )
        return RemoteModel(source, tokenizer=tokenizer, remote=remote)
    loaded = load_checkpoint(
        source,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        device_map=device_map,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if stack is not None or example is not None or (found := image_part(loaded.module)) is None:
        return Model(
            loaded.module,
            loaded.tokenizer,
            loaded.id,
            notes=loaded.notes,
            stack=stack,
            example=example,
        )
    name, part = found
    note = (
        f"a model of images and texts: opened as its '{name}', which reads images; stack= (--stack) opens any stack "
        "in the whole model, `interp clip-heads` reads both"
    )
    return Model(part, loaded.tokenizer, loaded.id, notes=[*loaded.notes, note])
