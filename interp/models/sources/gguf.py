"""A `.gguf` file: its header checked here in milliseconds, its weights dequantised by transformers.

The header says where every tensor ends, so a file cut short is found without reading a weight.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import io
import mmap
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp.errors import BadInput
from interp.models.sources.base import Loaded, Source
from interp.models.sources.pretrained import load_module, load_tokenizer

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself: metadata by key, and how many bytes it must have."""

    metadata: dict[str, Any]
    n_tensors: int
    n_bytes: int


def load_gguf(
    path: Path, *, tokenizer: Any, shown: str, source: Source = "gguf", **options: Any
) -> Loaded:
    """The model of a GGUF file, dequantised to plain weights, with the tokenizer it carries."""
    header = read_header(path)
    _check_architecture(header, path)
    architecture = header.metadata["general.architecture"]
    gguf_class = "AutoModelForSeq2SeqLM" if architecture == "t5" else "AutoModelForCausalLM"
    with _without_bar():
        module, notes = load_module(
            str(path.parent),
            {},
            shown=shown,
            trust_remote_code=False,
            gguf_class=gguf_class,
            gguf_file=path.name,
            **options,
        )
    quantizer: Any = getattr(module, "hf_quantizer", None)
    if quantizer is not None:  # the weights are plain now; the mark would forbid saving and casting
        quantizer.remove_quantization_config(module)
    if tokenizer is None:
        tokenizer = load_tokenizer(str(path.parent), shown=shown, gguf_file=path.name)
        notes += _split_as_trained(tokenizer, header.metadata.get("tokenizer.ggml.pre", "default"))
    return Loaded(module, tokenizer, shown, source, notes=notes)


def _split_as_trained(tokenizer: Any, pre: str) -> tuple[str, ...]:
    """Gives the tokenizer the word splitting its file names, where transformers does not know it.

    transformers 5.23 ignores `smollm`: single digits, then GPT-2's pattern. Without it "x =   5"
    gets other ids than in training (checked against llama.cpp).
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if pre in {"default", "gpt-2", *GGUF_PRE_TOKENIZER_SPLITS}:
        return ()
    if pre == "smollm":
        from tokenizers import pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        return ()
    return (
        f"this file splits words by '{pre}', which transformers does not know: token ids may "
        "differ from training; pass the original tokenizer with tokenizer=",
    )


@contextmanager
def _without_bar() -> Iterator[None]:
    """Drops the one bar that transformers draws past its own switch; the rest of stderr is kept."""
    with io.StringIO() as written:
        try:
            with redirect_stderr(written):
                yield
        finally:
            lines = written.getvalue().replace("\r", "\n").splitlines()
            kept = [line for line in lines if line and "de-quantizing GGUF" not in line]
            sys.stderr.write("".join(line + "\n" for line in kept))


def _check_architecture(header: Header, path: Path) -> None:
    import transformers
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    def plain(name: str) -> str:
        return name.replace("-", "").replace("_", "").lower()

    architecture = str(header.metadata.get("general.architecture"))
    readable = sorted({*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS})
    if not any(plain(name) in plain(architecture) for name in readable):
        raise BadInput(
            f"'{path.name}' is a '{architecture}' model, which transformers "
            f"{transformers.__version__} cannot read from GGUF; give its safetensors folder "
            f"or hub id, or one of {', '.join(readable)}"
        )


def read_header(path: Path) -> Header:
    """The metadata of a GGUF file, checked to be whole.

    Raises:
        BadInput: it is not a GGUF file, its header is damaged, or it is shorter than it says.
    """
    size = path.stat().st_size
    if size < 24:
        raise BadInput(f"'{path}' is no GGUF file: {size} bytes; copy or download it again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise BadInput(
                f"'{path}' is no GGUF file: it begins with {data[:4]!r}, wanted b'GGUF'; "
                "copy or download it again"
            )
        try:
            header = _Reader(data).header()
        except (struct.error, ValueError, KeyError, OverflowError) as error:
            raise BadInput(
                f"corrupt GGUF '{path}': its header cannot be read ({error}); "
                "copy or download it again"
            ) from error
    if size < header.n_bytes:
        raise BadInput(
            f"truncated GGUF '{path}': {size:,} bytes of {header.n_bytes:,}; "
            "copy or download it again"
        )
    return header


class _Reader:
    """Walks the header of a mapped GGUF file; long arrays are skipped, not kept."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 4

    def header(self) -> Header:
        version = self.take("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, wanted 2 or 3")
        n_tensors, n_keys = self.take("Q"), self.take("Q")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.string()
            metadata[key] = self.value(self.take("I"))
        if "general.architecture" not in metadata:
            raise ValueError("no general.architecture")
        ends = [self.tensor_end() for _ in range(n_tensors)]
        if not ends:
            raise ValueError("no tensors")
        alignment = int(metadata.get("general.alignment", 32))
        start = -(-self.at // alignment) * alignment
        return Header(metadata, n_tensors, start + max(ends))

    def take(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.take("Q")
        if self.at + length > len(self.data):
            raise ValueError("it ends inside a string")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])
        kind, count = self.take("I"), self.take("Q")
        if kind in _SCALARS:
            self.at += count * struct.calcsize("<" + _SCALARS[kind])
            return f"{count} numbers"
        for _ in range(count):
            self.value(kind)
        return f"{count} entries"

    def tensor_end(self) -> int:
        """Where this tensor's data ends, in bytes from the start of the data section."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        self.string()
        n_values = 1
        for _ in range(self.take("I")):
            n_values *= self.take("Q")
        per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(self.take("I"))]
        return self.take("Q") + n_values // per_block * block_bytes
