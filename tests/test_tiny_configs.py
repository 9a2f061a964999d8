"""Tiny configs: what default configs leave open is filled by name, and fields that depend on each other still fit."""

from __future__ import annotations

import time
from typing import Any

import pytest
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks import architectures, callers
from benchmarks.architectures import runs
from benchmarks.field_rules import HEADS, HIDDEN, VARIANTS, Variant
from benchmarks.model_types import own_classes
from benchmarks.open_fields import filled, fitting, of_layers, rope_of_types, spelt, supplied
from benchmarks.tiny_configs import (
    FAST,
    attention_switches,
    build,
    default_config,
    needed_libraries,
    shrunk,
    tiny_model,
)
from benchmarks.told_sizes import MOST, fitted

FILLED = next(variant for variant in VARIANTS if variant.filled)
DIVIDED = next(variant for variant in VARIANTS if variant.divided)
SIXTHS = next(variant for variant in VARIANTS if variant.hidden != HIDDEN)

PARTS = next(variant for variant in VARIANTS if variant.parts)
TOLD = next(variant for variant in VARIANTS if variant.told)


def default(model_type: str) -> Any:
    return CONFIG_MAPPING[model_type]()


class Forgetful(PreTrainedConfig):
    """A config class without a field that its model reads."""

    model_type = "forgetful"


def test_a_list_of_kinds_of_layers_left_open_names_every_kind_that_the_model_knows() -> None:
    config = default("lfm2_moe")
    assert config.layer_types is None
    made = filled("layer_types", {}, 5, config)
    assert len(made) == 5 and set(made) == {"full_attention", "conv"}
    text = default("deepseek_ocr2").text_config
    assert set(filled("mlp_layer_types", {}, 2, text)) == {"dense", "sparse"}
    assert filled("mlp_layer_types", {}, 2, default("bert")) is None


def test_a_default_of_several_is_the_first_of_them_and_an_unknown_field_stays_open() -> None:
    config = default("bert")
    assert filled("default_language", {"languages": ["en", "de"]}, 3, config) == "en"
    assert filled("head_dim", {}, 3, config) * HEADS == HIDDEN
    assert filled("chunk_size_feed_forward", {}, 3, config) is None


def test_heads_make_up_the_widened_stream_where_they_did() -> None:
    old = {"hidden_size": 4096, "expand": 2, "num_heads": 128, "head_dim": 64}
    new = {"hidden_size": 64, "expand": 2, "num_heads": 4, "head_dim": 16}
    assert fitting(old, new) == {"num_heads": 8}
    assert fitting({**old, "num_heads": 100}, new) == {}
    assert fitting({"hidden_size": 64}, {"hidden_size": 64}) == {}


def test_heads_that_a_flag_alone_says_to_be_rotated_are_as_wide_as_is_rotated_of_them() -> None:
    old, new = {"hidden_size": 768, "use_rotary_embedding": True}, {"hidden_size": 64}
    assert fitting(old, new) == {"num_attention_heads": 2}
    assert fitting({**old, "use_rotary_embedding": False}, new) == {}


def test_a_window_of_pixels_is_of_whole_merged_patches_where_it_was() -> None:
    config: Any = shrunk(default("qwen2_5_vl").vision_config, Variant())
    merged = config.patch_size * config.spatial_merge_size
    assert config.window_size == 2 * merged
    assert fitting({"window_size": 7, "patch_size": 4}, {"patch_size": 4}) == {}
    uneven = {"window_size": 7, "patch_size": 4, "spatial_merge_size": 2}
    assert fitting(uneven, uneven) == {}


def test_a_text_is_projected_to_the_width_in_which_a_tower_ends() -> None:
    before, config = default("align"), shrunk(default("align"), Variant())
    small: Any = config
    images = small.vision_config
    assert before.projection_dim == 2 * before.vision_config.out_channels[-1]
    assert small.projection_dim == images.out_channels[-1] * images.width_coefficient


def test_speech_is_fast_where_its_rate_is_a_field() -> None:
    small: Any = shrunk(default("vits"), Variant())
    assert small.speaking_rate == FAST > default("vits").speaking_rate


def test_a_spectrogram_is_folded_as_often_as_it_was() -> None:
    before, config = default("clap").audio_config, shrunk(default("clap"), Variant())
    small: Any = config
    sound = small.audio_config
    assert sound.spec_size < before.spec_size
    assert sound.spec_size // sound.num_mel_bins == before.spec_size // before.num_mel_bins == 4


def test_a_field_that_has_two_names_is_divided_by_either() -> None:
    config: Any = CONFIG_MAPPING["omdet-turbo"](use_timm_backbone=False)
    assert "encoder_hidden_dim" in config.attribute_map
    small: Any = shrunk(config, PARTS)
    assert small.encoder_hidden_dim == small.d_model == config.d_model // 8
    assert small.backbone_config.embed_dim == config.backbone_config.embed_dim // 8


def test_rotary_settings_are_made_for_kinds_of_layers_only_where_there_are_none() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert set(rope_of_types(kinds, {})) == set(kinds)
    known = {"rope_theta": 1.0}
    assert rope_of_types(kinds, known) is known and rope_of_types(None, {}) == {}


def test_what_single_layers_have_goes_with_the_layers_that_are_kept() -> None:
    config = default("gemma4_text")
    wide = config.layer_types.index("full_attention")
    assert of_layers(config, [0, wide]) == {1: {"head_dim": 512}}
    assert of_layers(default("llama"), [0, 1]) == {}


def test_a_field_that_the_class_forgot_is_supplied_and_other_faults_stay() -> None:
    def make(config: Any) -> float:
        return config.rope_theta * config.inner.rope_theta

    config: Any = Forgetful(inner=Forgetful())
    assert supplied(make, config) == config.rope_theta**2
    with pytest.raises(AttributeError, match="never_named"):
        supplied(lambda config: config.never_named, Forgetful())
    with pytest.raises(AttributeError, match="rope_theta"):
        supplied(lambda config: nn.Linear(1, 1).rope_theta, Forgetful())


def test_parts_of_one_scale_keep_their_ratio() -> None:
    config = default("blt")
    small: Any = shrunk(config, Variant(common=True))
    wide, narrow = small.global_config, small.encoder_config
    assert (narrow.hidden_size, wide.hidden_size) == (HIDDEN, 2 * HIDDEN)
    assert narrow.hidden_size_global == wide.hidden_size
    assert wide.hidden_size // wide.num_attention_heads == HIDDEN // HEADS
    apart: Any = shrunk(default("blt"), Variant())
    assert apart.global_config.hidden_size == apart.encoder_config.hidden_size == HIDDEN


def test_parts_of_the_hidden_size_still_sum_to_it() -> None:
    config: Any = shrunk(default("reformer"), Variant())
    assert sum(config.axial_pos_embds_dim) == config.hidden_size == HIDDEN


def test_sixths_of_the_hidden_size_stay_sixths_where_it_can_be_divided_so() -> None:
    config: Any = shrunk(default("layoutlmv3"), SIXTHS)
    assert 4 * config.coordinate_size + 2 * config.shape_size == config.hidden_size == SIXTHS.hidden
    assert config.hidden_size % 6 == config.hidden_size % config.num_attention_heads == 0


def test_tokens_that_fill_up_tables_are_in_them() -> None:
    config: Any = shrunk(default("markuplm"), Variant())
    assert 0 <= config.tag_pad_id < config.max_xpath_tag_unit_embeddings
    assert 0 <= config.subs_pad_id < config.max_xpath_subs_unit_embeddings


def test_widths_of_stages_divided_alike_still_fit_each_other() -> None:
    config: Any = shrunk(default("sam2_vision_model"), DIVIDED)
    stages = config.backbone_config.embed_dim_per_stage
    assert stages == [12, 24, 48, 96] and config.backbone_config.hidden_size == stages[0]
    assert config.backbone_channel_list == stages[::-1]
    detector: Any = shrunk(default("deimv2"), DIVIDED)
    assert detector.backbone_config.stem_channels[0] == 3  # images' channels are no width
    assert set(detector.decoder_in_channels) == {detector.encoder_hidden_dim}
    assert tuple(detector.encoder_in_channels) == detector.backbone_config.stage_out_channels[1:]


def test_parts_of_a_segmenter_read_what_others_make() -> None:
    for of in ("sam", "sam2"):
        config: Any = shrunk(default(of), PARTS)
        prompts, decoder, images = (
            getattr(config, f"{part}_config")
            for part in ("prompt_encoder", "mask_decoder", "vision")
        )
        made = images.output_channels if of == "sam" else images.fpn_hidden_size
        assert prompts.hidden_size == decoder.hidden_size == made == 32
        side = prompts.image_size // prompts.patch_size
        if of == "sam":
            assert side == images.image_size // images.patch_size
        else:
            assert images.backbone_feature_sizes[-1] == [side, side]


def test_what_a_config_works_out_is_worked_out_anew_from_divided_widths() -> None:
    before, config = default("efficientloftr"), shrunk(default("efficientloftr"), DIVIDED)
    made: Any = config
    assert made.hidden_size == made.out_features[-1] == before.hidden_size // 8
    assert made.fine_fusion_dims == made.out_features[:0:-1]
    assert made.num_attention_heads == before.num_attention_heads  # its angles are of several heads


def test_a_backbone_of_one_stage_returns_all_where_widths_are_divided() -> None:
    assert len(shrunk(default("uvdoc"), Variant()).backbone_config.out_features) == 1
    assert len(shrunk(default("uvdoc"), DIVIDED).backbone_config.out_features) == 6


def test_an_image_twice_as_high_as_wide_stays_so() -> None:
    config: Any = shrunk(default("seggpt"), Variant(image=32))
    assert list(config.image_size) == [64, 32]


def test_layers_that_share_keys_have_their_kind_before_them() -> None:
    config: Any = shrunk(default("gemma3n_text"), Variant())
    alone = config.layer_types[: -config.num_kv_shared_layers]
    assert config.num_kv_shared_layers and set(alone) == set(config.layer_types)


def test_an_empty_list_of_scales_is_one_of_1() -> None:
    config: Any = shrunk(default("lw_detr"), FILLED)
    assert list(config.projector_scale_factors) == [1.0]


@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [
        ("lfm2_moe", "Lfm2MoeForCausalLM"),
        ("dbrx", "DbrxForCausalLM"),
        ("dots3_note_text", "Dots3NoteForCausalLM"),
        ("mamba2", "Mamba2ForCausalLM"),
        ("cohere_compass_text", "CohereCompassForCausalLM"),
        ("t5gemma2_encoder", "T5Gemma2Encoder"),
        ("lilt", "LiltModel"),
        ("layoutlmv3", "LayoutLMv3Model"),
        ("markuplm", "MarkupLMModel"),
    ],
)
def test_models_whose_fields_are_open_or_depend_on_each_other_are_built(
    model_type: str, class_name: str
) -> None:
    module = tiny_model(model_type, class_name, runs)
    assert sum(parameter.numel() for parameter in module.parameters()) < 2_000_000


@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [("sam2_vision_model", "Sam2VisionModel"), ("uvdoc", "UVDocModel")],
)
def test_models_whose_stages_must_fit_are_built_with_divided_widths(
    model_type: str, class_name: str
) -> None:
    module = build(getattr(transformers, class_name), shrunk(default(model_type), DIVIDED))
    runs(module)
    assert sum(parameter.numel() for parameter in module.parameters()) < 2_000_000


def test_a_tower_of_another_library_is_its_smallest_and_a_model_s_own_architecture_stays() -> None:
    config: Any = shrunk(default("fast_vlm"), Variant())
    assert config.vision_config.architecture == "test_vit"
    own: Any = shrunk(default("timm_wrapper"), Variant())
    assert own.architecture == "resnet50"


def test_a_field_that_a_default_config_misspells_is_the_one_that_is_meant() -> None:
    """EdgeTAM's names an `archirecture`, and the widths of that one's stages; these stay where others are divided."""
    whole = default("edgetam_vision_model")
    assert whole.backbone_config.architecture == "resnet50"
    assert whole.backbone_config.archirecture == "repvit_m1"
    for variant in (Variant(), PARTS):
        backbone: Any = shrunk(whole, variant)
        assert backbone.backbone_config.architecture == "repvit_m1"
        assert backbone.backbone_channel_list == whole.backbone_channel_list
    other = default("bert")
    other.hidden_act_ = "relu"
    fields = {"hidden_act": "gelu", "hidden_act_": "relu"}
    assert spelt(other, fields) == fields


def test_kernels_are_as_loud_as_is_asked() -> None:
    """Convolutions that add to what they read overflow where each makes it larger: the last variant's do not."""
    small = shrunk(default("resnet"), Variant())
    loud, calm = (build(transformers.ResNetModel, small, gain) for gain in (2.0, 1.0))
    kernels = [[x for x in each.parameters() if x.ndim > 3] for each in (loud, calm)]
    assert kernels[0] and all(a.equal(2 * b) for a, b in zip(*kernels, strict=True))
    assert any(variant.gain == 1.0 for variant in VARIANTS)


def test_the_sweep_says_what_it_was_run_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "BESIDES", {"no-such-package": "no_such_package"})
    assert architectures.libraries() == f"transformers {transformers.__version__}"
    monkeypatch.setattr(architectures, "BESIDES", {"torch": "torch", "pytest": "pytest"})
    assert architectures.libraries().endswith(f" and pytest {pytest.__version__}")
    assert architectures.libraries() in architectures.markdown([])


def test_a_model_without_attention_by_default_is_tried_with_what_switches_it_on() -> None:
    row = architectures.examine("patchtsmixer", "other", ["PatchTSMixerModel"])
    assert row is not None and (row.outcome, row.reason) == ("in full", "with self_attn=True")
    assert row.n_heads > 0
    off = attention_switches(default("gpt2"))
    assert off == [] and default("gpt2").add_cross_attention is False


def test_files_that_call_the_attention_interface_and_have_no_row_in_full_are_named() -> None:
    def row(model_type: str, model: str, outcome: str) -> architectures.Row:
        return architectures.Row(model_type, "decoder", model, outcome, reason="so it is")

    files = callers.calling_files()
    assert "LlamaModel" in files["modeling_llama"] and "modeling_resnet" not in files
    none = callers.not_in_full([])
    assert set(none) == set(files)
    rows = [row("bert", "BertModel", "in full"), row("llama", "LlamaForCausalLM", "partly")]
    rows.append(row("bert", "BertForMaskedLM", "refused"))
    left = callers.not_in_full(rows)
    assert set(none) - set(left) == {"modeling_bert"}
    assert left["modeling_llama"] == "llama partly (so it is)"
    assert left["modeling_qwen2"] == "no model type of it is swept"
    page = architectures.markdown(rows)
    assert f"1 of {len(files)} modelling files" in page
    assert "modeling_llama: llama partly" in page and "modeling_bert:" not in page


def test_a_base_model_that_takes_too_long_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "SECONDS", -1)
    monkeypatch.setattr(architectures, "_child", lambda *_: time.sleep(60))
    (row,) = architectures.sweep(["sam2_vision_model"], 1)
    assert (row.kind, row.outcome) == ("vision", "not built") and "took more than" in row.reason


def test_types_that_no_auto_class_lists_are_swept_by_the_models_that_their_file_shows() -> None:
    kinds = {name: kind for name, kind, _ in architectures.model_types()}
    assert kinds["siglip_text_model"] == "unlisted" and kinds["bert"] == "encoder"
    assert len([row for row in architectures.model_types() if row[0] == "pop2piano"]) == 1
    shown = own_classes("clvp_decoder")  # a head tells more; what is no model has no forward
    assert shown == ["ClvpForCausalLM", "ClvpModel", "ClvpDecoder"]
    assert own_classes("colpali") == ["ColPaliForRetrieval"] and own_classes("nougat") == []
    assert architectures.examine("nougat", "unlisted", []) is None
    row = architectures.examine("siglip_text_model", "unlisted", [])
    assert row is not None and (row.model, row.outcome) == ("SiglipTextModel", "in full")
    table = architectures.counts(
        [row, architectures.Row("bert", "encoder", "BertModel", "in full")]
    )
    assert "1 model types verified in full, of 1 built and 1 known" in table
    assert "\n1 that no auto class lists" in table


def test_a_size_that_a_failure_tells_is_given_to_the_field_that_has_the_other() -> None:
    """Llama 4's default tower folds pixels to more channels than its adapter reads; only one field mends it."""
    small: Any = shrunk(default("llama4_vision_model"), TOLD)

    def made(config: Any) -> Any:
        module = build(transformers.Llama4VisionModel, config)
        runs(module)
        return module

    with pytest.raises(RuntimeError, match="256 and 96"):
        made(small)
    module = fitted(made, small)
    told = {n for n, x in vars(small).items() if vars(module.config)[n] != x and n[0] != "_"}
    assert told == {"intermediate_size"} and module.config.intermediate_size == 256
    assert small.intermediate_size == 96


def test_a_failure_that_tells_no_sizes_or_that_no_field_mends_stays_what_it_was() -> None:
    tried = []

    def fails(config: Any) -> None:
        tried.append(config.hidden_size)
        raise ValueError("Expected size 64 but got size 7" if told else "so it is")

    for told in (False, True):
        tried.clear()
        with pytest.raises(ValueError, match="size 7" if told else "so it is"):
            fitted(fails, shrunk(default("bert"), TOLD))
        assert 1 < len(tried) <= MOST + 1 if told else len(tried) == 1


def test_what_a_class_works_out_and_many_channels_follow_the_hidden_size_where_failures_are_heeded() -> (
    None
):
    config: Any = shrunk(default("phi4_multimodal_audio"), TOLD)
    assert config.input_size == HIDDEN and config.nemo_final_size == HIDDEN // 8
    assert config.nemo_conv_channels == config.ext_pw_out_channel == HIDDEN
    assert default("phi4_multimodal_audio").nemo_final_size == 10


def test_a_library_that_is_missing_is_the_reason_and_nothing_else() -> None:
    said = "X requires the {} library but it was not found in your environment."
    both = ImportError(f"{said.format('PIL')} {said.format('timm')} {said.format('timm')}")
    assert needed_libraries(both) == "needs PIL and timm"
    assert needed_libraries(ValueError(str(both))) == needed_libraries(ImportError("no")) == ""


def test_a_default_that_its_own_validator_refuses_has_what_the_validator_asks_for() -> None:
    """Gemma 4's draft model has no inputs a layer. No layer then makes a cache, for which another check refuses it."""
    with pytest.raises(Exception, match="hidden_size_per_layer_input must be 0, got 256"):
        default("gemma4_assistant")
    config: Any = default_config("gemma4_assistant")
    text = config.text_config
    assert (text.hidden_size_per_layer_input, text.vocab_size_per_layer_input) == (0, 0)
    small: Any = shrunk(config, Variant())
    shared = small.text_config.num_kv_shared_layers
    assert shared == small.text_config.num_hidden_layers > 0
    with pytest.raises(ValueError, match="layer types producing a cache is different"):
        build(transformers.Gemma4AssistantForCausalLM, small)


def test_a_norm_that_is_given_another_shape_is_switched_off() -> None:
    """OmDet-Turbo norms what timm's backbones return, with channels last; transformers' own have them first."""
    config = default("omdet-turbo")
    heard = []

    def made(config: Any) -> bool:
        heard.append(config.apply_layernorm_after_vision_backbone)
        if heard[-1]:
            raise RuntimeError("Given normalized_shape=[192], expected input with shape [*, 192]")
        return heard[-1]

    assert fitted(made, config) is False and heard == [True, False]
    assert config.apply_layernorm_after_vision_backbone
