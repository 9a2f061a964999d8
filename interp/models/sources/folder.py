"""A local folder as `save_pretrained` writes it, looked through before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from interp.errors import BadInput
from interp.models.sources.base import Loaded, Source
from interp.models.sources.pretrained import check_config, first_line, load_module, load_tokenizer

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)


def load_folder(
    folder: Path,
    *,
    tokenizer: Any,
    shown: str,
    trust_remote_code: bool = False,
    source: Source = "folder",
    **options: Any,
) -> Loaded:
    """The model of a folder with `config.json` and safetensors (or tensors-only pickle) weights."""
    config = read_config(folder / "config.json", shown)
    check_weights(folder, shown)
    check_config(config, shown=shown, trust_remote_code=trust_remote_code)
    module, notes = load_module(
        str(folder), config, shown=shown, trust_remote_code=trust_remote_code, **options
    )
    if tokenizer is None:
        if any((folder / name).exists() for name in _TOKENIZER_FILES):
            tokenizer = load_tokenizer(
                str(folder), shown=shown, trust_remote_code=trust_remote_code
            )
        else:
            notes = (*notes, "no tokenizer in this folder; pass one with tokenizer=")
    return Loaded(module, tokenizer, shown, source, notes=notes)


def read_config(path: Path, shown: str) -> dict[str, Any]:
    """The parsed `config.json`, or the reason why this folder is no checkpoint."""
    folder = path.parent
    if not path.exists():
        ggufs = sorted(folder.glob("*.gguf"))
        if ggufs:
            raise BadInput(f"no config.json in '{shown}'; for its GGUF file give '{ggufs[0]}'")
        if (folder / "adapter_config.json").exists():
            raise BadInput(
                f"'{shown}' is an adapter, not a model; merge it into its base model "
                "(peft's merge_and_unload), save that and give its folder"
            )
        raise BadInput(
            f"no config.json in '{shown}' ({_listing(folder)}); "
            "wanted a folder as save_pretrained writes it"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"the config.json of '{shown}' cannot be read: {first_line(error)}; copy it again"
        ) from error
    if not isinstance(config, dict):
        raise BadInput(f"the config.json of '{shown}' is not a JSON object; copy it again")
    return config


def check_weights(folder: Path, shown: str) -> None:
    """Weights are there, in full and not cut short; safetensors preferred to pickles."""
    single = folder / "model.safetensors"
    if single.exists():
        return _check_safetensors([single], shown)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return _check_safetensors(_shards(index, shown), shown)
    pickle_index = folder / "pytorch_model.bin.index.json"
    if (folder / "pytorch_model.bin").exists():
        return None
    if pickle_index.exists():
        _shards(pickle_index, shown)
        return None
    raise BadInput(
        f"no weights in '{shown}' ({_listing(folder)}); wanted model.safetensors or its shards: "
        "finish the download, or save the model there with save_pretrained"
    )


def _shards(index: Path, shown: str) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"the {index.name} of '{shown}' cannot be read; copy it again") from error
    absent = [name for name in names if not (index.parent / name).exists()]
    if absent:
        raise BadInput(
            f"{len(absent)} of {len(names)} weight files of '{shown}' are missing, first "
            f"'{absent[0]}'; finish the download"
        )
    return [index.parent / name for name in names]


def _check_safetensors(paths: list[Path], shown: str) -> None:
    """Reads headers only: they say how long the file must be, so a cut file is found at once."""
    from safetensors import SafetensorError, safe_open

    for path in paths:
        try:
            with safe_open(str(path), framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise BadInput(
                f"corrupt safetensors '{path.name}' in '{shown}': {first_line(error)}; "
                "copy or download it again"
            ) from error


def _listing(folder: Path, limit: int = 6) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return "it is empty"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return "it holds " + ", ".join(names[:limit]) + more
