"""One function that loads a checkpoint from anywhere, and the list of what can be loaded here.

Nothing of torch or transformers is imported until a model is asked for.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import BadInput
from interp.models.sources import embedded
from interp.models.sources.base import Loaded, check_finite, model_sha256, weights_sha256

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Loaded", "available_models", "load_checkpoint", "model_sha256", "weights_sha256"]


def load_checkpoint(
    source: str | os.PathLike[str] | nn.Module | Any,
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """A model in eval mode with every weight from its checkpoint and none of them NaN.

    Args:
        source: "smollm2-135m", a hub id "org/name", a folder, a `.gguf` file, an `nn.Module`, a
            TransformerLens bridge or an nnsight model. A file or folder of that name goes before the
            hub.
        tokenizer: used instead of the checkpoint's own: a tokenizer, or a folder or hub id of one.
        device: "cpu", "cuda", "cuda:1", "mps"; not given or "auto": CUDA if there is one, else CPU.
        dtype: "float32", "bf16", a torch dtype, …; not given or "auto": the dtype the weights were
            saved in, as their numbers are then exactly the published ones. The embedded model and
            GGUF files are block-quantised, have no such dtype and come in float32.
        device_map: for models too large for one device; passed on to transformers ("auto", …).
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run Python code that the checkpoint brings along. Off.

    Returns:
        The module, its tokenizer (None where there is none), its id, source and notes. A live
        module is neither moved nor cast; it is switched to eval mode.

    Raises:
        BadInput: one line saying what was wrong and what to do, before the expensive part where
            that can be known.

    Example:
        >>> load_checkpoint("smollm2-135")  # doctest: +SKIP
        Traceback (most recent call last):
        interp.errors.BadInput: no model 'smollm2-135': … did you mean 'smollm2-135m'?
    """
    if isinstance(tokenizer, (str, os.PathLike)):
        from interp.models.sources.pretrained import load_tokenizer

        tokenizer = load_tokenizer(os.fspath(tokenizer), shown=os.fspath(tokenizer))
    if not isinstance(source, (str, os.PathLike)):
        from interp.models.sources.live import load_live

        loaded = load_live(
            source,
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            device_map=device_map,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        check_finite(loaded.module, loaded.id)
        return loaded

    kind, name, path = kind_of(os.fspath(source))
    if revision is not None and kind != "hub":
        raise BadInput(
            f"revision '{revision}' was given with '{name}'; only a hub id has revisions"
        )

    from interp.models.sources.placement import resolve_device, resolve_dtype

    place = resolve_device(device, device_map)
    numbers = resolve_dtype(dtype, default="auto")
    if kind in ("embedded", "gguf") and numbers == "auto":
        numbers = resolve_dtype("float32", default="auto")
    mapped = {} if device_map is None else {"device_map": device_map}

    from interp.models.sources.pretrained import one_line, with_padding

    tokenizer = with_padding(tokenizer)
    if kind == "embedded":
        loaded = embedded.load_embedded(tokenizer=tokenizer, dtype=numbers, **mapped)
    elif kind == "gguf":
        from interp.models.sources.gguf import load_gguf

        loaded = load_gguf(path, tokenizer=tokenizer, shown=name, dtype=numbers, **mapped)
    elif kind == "folder":
        from interp.models.sources.folder import load_folder

        loaded = load_folder(
            path,
            tokenizer=tokenizer,
            shown=name,
            trust_remote_code=trust_remote_code,
            dtype=numbers,
            **mapped,
        )
    else:
        from interp.models.sources.hub import load_hub

        loaded = load_hub(
            name,
            tokenizer=tokenizer,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=numbers,
            **mapped,
        )
    check_finite(loaded.module, name)
    if place is not None:
        with one_line(name):
            loaded.module.to(place)
    return loaded


def available_models() -> list[dict[str, Any]]:
    """What can be given as MODEL on this machine: one row a model, then one a form, by example.

    Returns:
        Rows with `model`, `source`, `installed` (None for a form) and `note`.
    """
    from interp.models.sources.hub import cached_repos

    path = embedded.gguf_path()
    note = "SmolLM2-135M-Instruct, 4-bit weights dequantised" if path else embedded.INSTALL
    rows = [_row(embedded.NAME, "embedded", path is not None, note)]
    rows += [
        _row(repo, "hub", True, f"{n_bytes / 1e6:,.0f} MB in the hub's local cache")
        for repo, n_bytes in cached_repos().items()
    ]
    return [
        *rows,
        _row("openai-community/gpt2", "hub", None, "any hub id; downloaded at first use"),
        _row("./my-model", "folder", None, "a folder with config.json and safetensors"),
        _row("./model.Q8_0.gguf", "gguf", None, "a GGUF file; dequantised to float32"),
        _row("interp.load(module, tokenizer=…)", "live", None, "an nn.Module, in Python"),
        _row("interp.load(bridge)", "live", None, "a TransformerLens bridge, in Python"),
        _row("interp.load(nnsight_model)", "live", None, "here, or on NDIF with remote=True"),
    ]


def _row(model: str, source: str, installed: bool | None, note: str) -> dict[str, Any]:
    return {"model": model, "source": source, "installed": installed, "note": note}


def kind_of(given: str) -> tuple[str, str, Path]:
    """Which source a string means, its name for reports, and its path where it is one.

    >>> kind_of("smollm2-135m")[0], kind_of("openai-community/gpt2")[0]
    ('embedded', 'hub')
    """
    if not given.strip():
        raise BadInput("the model's name is empty; `interp models` lists what can be given")
    if given.lower() == embedded.NAME:
        return "embedded", embedded.NAME, Path()
    path = Path(given).expanduser()
    if path.is_dir():
        return "folder", given, path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return "gguf", given, path
        raise BadInput(
            f"'{given}' is a file that is no .gguf; wanted a model name, a folder or a .gguf file: "
            f"its folder is '{path.parent}'"
        )
    if _looks_like_path(given):
        raise BadInput(f"no file or folder '{given}'; {_nearby(path)}")
    if (
        "/" not in given
        and difflib.SequenceMatcher(None, given.lower(), embedded.NAME).ratio() > 0.85
    ):
        from interp.models.sources.hub import not_found

        raise not_found(given)
    return "hub", given, path


def _looks_like_path(given: str) -> bool:
    return (
        given.startswith((".", "/", "~"))
        or given.count("/") > 1
        or "\\" in given
        or given.lower().endswith((".gguf", ".safetensors", ".bin", ".pt"))
    )


def _nearby(path: Path) -> str:
    """The nearest name beside a path that is not there, or the first part of it that is missing."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    near = difflib.get_close_matches(path.name, os.listdir(parent), n=1)
    return f"did you mean '{parent / near[0]}'?" if near else f"'{parent}' has no '{path.name}'"
