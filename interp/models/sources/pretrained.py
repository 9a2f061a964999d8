"""The one door to transformers' loaders: quiet, strict, and with errors of one line.

Where transformers warns and goes on (a weight that the checkpoint lacks is filled with random
numbers), this stops: an analysis of half-random weights looks like a result.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from interp.errors import BadInput, InterpError

if TYPE_CHECKING:
    from torch import nn

# What transformers is known to raise on a bad checkpoint, a bad config or a failed download.
_LOADER_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    EOFError,
    ImportError,
)


def load_module(
    name: str, config: Mapping[str, Any], *, shown: str, trust_remote_code: bool, **options: Any
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model that `config` names, with every weight found in the checkpoint, and notes on it.

    Args:
        name: what `from_pretrained` is given: a folder or a hub id.
        config: the parsed `config.json`, or `{}` for a GGUF file.
        shown: the model's name for messages.
        options: passed to `from_pretrained`.

    Raises:
        BadInput: transformers cannot load it, or weights are missing or of the wrong shape.
    """
    loader = _model_class(config, trust_remote_code, options.pop("gguf_class", None))
    # transformers itself takes sdpa where a class supports it, else eager. Only a config that asks
    # for another kernel (flash_attention_2, often not installed) is overruled.
    if config.get("_attn_implementation") or config.get("attn_implementation"):
        supports = getattr(loader, "_supports_sdpa", True)
        options["attn_implementation"] = "sdpa" if supports else "eager"
    with quiet(), one_line(shown):
        module, info = loader.from_pretrained(
            name,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with names
            weights_only=True,  # of a pickle, tensors only
            trust_remote_code=trust_remote_code,
            **options,
        )
    _check_complete(info, shown)
    extra = sorted(info["unexpected_keys"])
    notes = (
        (f"weights in the checkpoint that this model does not use: {_some(extra)}",)
        if extra
        else ()
    )
    return module.eval(), notes


def load_tokenizer(
    name: str, *, shown: str, trust_remote_code: bool = False, **options: Any
) -> Any:
    """The tokenizer at a folder or hub id, with a padding token."""
    from transformers import AutoTokenizer

    with quiet(), one_line(f"the tokenizer of {shown}"):
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, **options
        )
    return with_padding(tokenizer)


def with_padding(tokenizer: Any) -> Any:
    """The tokenizer, or where it has no padding token a copy that pads with its EOS.

    No token is added, so the model's embedding stays as it is; padded positions are masked.
    """
    if tokenizer is None or getattr(tokenizer, "pad_token", "") is not None:
        return tokenizer
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    known = tokenizer.convert_ids_to_tokens(0)
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token or known
    return tokenizer


def check_config(config: Mapping[str, Any], *, shown: str, trust_remote_code: bool) -> None:
    """Refuses, before any weight is read, an architecture that transformers has no code for."""
    import transformers

    kind = config.get("model_type")
    own_code = config.get("auto_map")
    known_kind = kind in transformers.CONFIG_MAPPING
    if known_kind and (_named_class(config) is not None or not own_code):
        return
    if own_code and trust_remote_code:
        return
    if own_code:
        raise BadInput(
            f"'{shown}' needs Python code of its own (model type '{kind}'), not run unless "
            "asked for; read that code, then pass trust_remote_code=True"
        )
    if kind is None:
        raise BadInput(
            f"the config.json of '{shown}' has no model_type; wanted a transformers checkpoint: "
            "convert it to that format first"
        )
    raise BadInput(
        f"transformers {transformers.__version__} knows no model type '{kind}' ('{shown}'); "
        "upgrade transformers, or give a supported checkpoint"
    )


def _named_class(config: Mapping[str, Any]) -> Any:
    """The transformers class that the config's first architecture names, if there is one."""
    import transformers

    architectures = config.get("architectures") or [""]
    found = getattr(transformers, str(architectures[0]), None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else None


def _model_class(config: Mapping[str, Any], trust_remote_code: bool, gguf_class: str | None) -> Any:
    """The class to load with: what the checkpoint names, else a language model, else the bare model."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    if gguf_class:
        return getattr(transformers, gguf_class)
    named = _named_class(config)
    if named is not None:
        return named
    own_code = config.get("auto_map") or {}
    if trust_remote_code and own_code:
        auto = [key for key in own_code if key.startswith("AutoModel")]
        auto.sort(key=lambda key: (key != "AutoModelForCausalLM", key == "AutoModel", key))
        if auto and hasattr(transformers, auto[0]):
            return getattr(transformers, auto[0])
    kind = config.get("model_type")
    if config.get("is_encoder_decoder") and kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForSeq2SeqLM
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def _check_complete(info: Mapping[str, Any], shown: str) -> None:
    missing = sorted(info["missing_keys"])
    if missing:
        raise BadInput(
            f"'{shown}' lacks {len(missing)} weights of its architecture ({_some(missing)}); they "
            "would be random: give a complete checkpoint, or correct 'architectures' in config.json"
        )
    mismatched = sorted(info["mismatched_keys"], key=str)
    if mismatched:
        name, got, wanted = mismatched[0]
        raise BadInput(
            f"{len(mismatched)} weights of '{shown}' do not fit its config.json: '{name}' is "
            f"{tuple(got)}, wanted {tuple(wanted)}; give the config.json they were saved with"
        )
    if info.get("error_msgs"):
        raise BadInput(
            f"'{shown}' did not load: {first_line(info['error_msgs'][0])}; save it again"
        )


@contextmanager
def one_line(shown: str) -> Iterator[None]:
    """Turns what transformers raises into one line with a next step; the cause stays attached."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from torch import OutOfMemoryError

    try:
        yield
    except InterpError:
        raise
    except SafetensorError as error:
        raise BadInput(
            f"corrupt safetensors in '{shown}': {first_line(error)}; copy or download it again"
        ) from error
    except pickle.UnpicklingError as error:
        raise BadInput(
            f"the pickle weights of '{shown}' hold more than tensors, or are damaged, and are not "
            "run; give safetensors (save_pretrained writes them)"
        ) from error
    except (OutOfMemoryError, MemoryError) as error:
        raise InterpError(
            f"'{shown}' does not fit into memory; try --dtype bf16 or --device cpu"
        ) from error
    except StrictDataclassError as error:
        detail = " ".join(str(error).split())
        raise BadInput(
            f"the config.json of '{shown}' is not valid: {detail}; correct it"
        ) from error
    except ImportError as error:
        raise BadInput(
            f"'{shown}' needs a package that is missing: {first_line(error)}; install it"
        ) from error
    except _LOADER_ERRORS as error:
        detail = first_line(error) or type(error).__name__
        raise BadInput(
            f"transformers could not load '{shown}': {detail}; check its files or give another"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' warnings and its bars; errors and the hub's download bars stay."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from transformers.utils import logging

    level, bars, no_downloads = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        are_progress_bars_disabled(),
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # also turns the hub's off
    if not no_downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # also turns the hub's on
        if no_downloads:
            disable_progress_bars()


def first_line(error: object) -> str:
    """The first line of an error's text, without its final stop.

    >>> first_line(ValueError("no such thing.  Try another.\\nmore"))
    'no such thing.  Try another'
    """
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else ""


def _some(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
