"""Models that an analysis cannot serve are refused before its data are looked at or the model is run."""

from inspect import Parameter, signature

import pytest
import torch
import transformers
from torch import nn

from circuits.recall import recall
from interp.errors import Refused
from interp.models.model import Model
from interp.registry import analysis_called
from tests.families import FAMILIES

TINY = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = [
    "circuit_evaluate",
    "circuit_find",
    "circuit_overlap",
    "decompose",
    "duo_attention",
    "edges",
    "head_groups",
    "ioi_roles",
    "patch",
    "path_patch",
    "probe_attention",
    "probe_causal",
    "probe_structure",
    "prune",
    "readout",
    "recall",
    "repair",
    "shapley",
    "vector_function",
    "vector_inject",
    "vector_steer",
    "vector_task",
]


def bart() -> nn.Module:
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    layers = {
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    }
    config = transformers.BartConfig(
        d_model=32, decoder_start_token_id=0, **TINY, **heads, **layers
    )
    return transformers.BartForConditionalGeneration(config).eval()


def mamba() -> nn.Module:
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **TINY)
    return transformers.MambaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def translator() -> Model:
    return Model(bart(), None, "translator")


@pytest.fixture(scope="module")
def eyes() -> Model:
    return Model(FAMILIES["vit"](), None, "eyes")


@pytest.fixture(scope="module")
def state_space() -> Model:
    return Model(mamba(), None, "state-space")


def asked(name: str, model: Model) -> str:
    """What the analysis says of this model, when nothing it is given besides can be read."""

    def forbidden(*_: object) -> None:
        raise AssertionError(f"{name} ran the model")

    function = analysis_called(name).function
    data = [
        object()
        for parameter in list(signature(function).parameters.values())[1:]
        if parameter.kind is not Parameter.KEYWORD_ONLY and parameter.default is Parameter.empty
    ]
    hook = model.module.register_forward_pre_hook(forbidden)
    try:
        with pytest.raises(Refused) as told:
            function(model, *data)
    finally:
        hook.remove()
    return str(told.value)


@pytest.mark.parametrize("name", TEXT)
def test_encoder_decoders_and_models_of_images_are_told_at_once(name, translator, eyes):
    told = asked(name, translator)
    assert told.startswith("translator is an encoder-decoder") and f"'{name}' wants" in told
    assert "interp lens" in told and "get_encoder" in told
    told = asked(name, eyes)
    assert told.startswith("eyes reads 'pixel_values'") and "interp heads" in told


def test_heads_reads_images_and_no_encoder_decoder(translator):
    assert "encoder-decoder" in asked("heads", translator)
    assert analysis_called("heads").takes == "one stack"


def test_what_an_analysis_is_survives_the_check():
    assert recall is analysis_called("recall").function
    assert recall.__name__ == "recall" and next(iter(signature(recall).parameters)) == "model"
    assert ">>>" in (recall.__doc__ or "")


@pytest.mark.parametrize("name", ["recall", "duo_attention", "heads", "prune", "shapley"])
def test_a_model_without_attention_is_told_that_and_nothing_else(name, state_space):
    told = asked(name, state_space)
    assert told.startswith("state-space cannot give") and "still work" in told


def test_causality_is_tried_where_no_attention_is_seen(state_space):
    """A state-space model reads forwards; the same with its blocks' input reversed reads from the end."""
    assert state_space.spec.causal
    backwards = mamba()
    for block in backwards.backbone.layers:
        block.mixer.register_forward_pre_hook(lambda _, args: (args[0].flip(1), *args[1:]))
        block.mixer.register_forward_hook(lambda _, args, output: output.flip(1))
    assert not Model(backwards, None, "backwards").spec.causal


def test_an_edited_token_is_not_felt_before_it(state_space):
    """What `causal` says, on another prompt and every position."""
    ids = torch.arange(10, 19)[None]
    with torch.no_grad():
        plain = state_space.module(ids).logits
        for at in range(1, 9):
            other = ids.clone()
            other[0, at] = 50
            moved = (state_space.module(other).logits - plain).abs().amax((0, 2))
            assert float(moved[:at].max()) < 1e-5 < float(moved[at])
