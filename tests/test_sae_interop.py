"""SAE files of the field: SAELens's own answers are the reference (tests/fixtures/saelens was written
by `benchmarks/sae_saelens.py fixtures` with sae-lens 6.54.12); the other formats are written here, by
the formulas that their code documents, and read back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.errors import BadInput, Refused
from interp.sites import AXES, Site
from probes.saes.interop import DICTIONARIES, HOOKS, load_sae, save_sae
from probes.saes.model import SAE, SAEConfig

FIXTURES = Path(__file__).parent / "fixtures" / "saelens"
FOLDERS = sorted(folder.name for folder in FIXTURES.iterdir())
WANTED = {
    "standard": "relu",
    "before_6": "relu",
    "before_6_topk": "topk",
    "topk": "topk",
    "topk_rescaled": "topk",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
}


def agree(sae: SAE, answers: dict[str, Tensor]) -> None:
    """Same latents and reconstructions, to float32 sums in another order."""
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(answers["x"]), answers["f"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sae(answers["x"]), answers["made"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FOLDERS)
def test_what_saelens_wrote_does_what_saelens_does(name):
    sae = load_sae(FIXTURES / name)
    answers = load_file(FIXTURES / name / "answers.safetensors")
    assert 0 < float((answers["f"] > 0).float().mean()) < 1
    agree(sae, answers)
    assert sae.config.activation == WANTED[name.removesuffix("_z")]
    assert sae.config.site == ("z.3" if name.endswith("_z") else "resid_post.3")
    assert sae.config.model == "gpt2-small" and sae.config.sha256 == ""


@pytest.mark.parametrize("name", FOLDERS)
def test_it_comes_back_from_our_own_folder(name, tmp_path):
    sae = load_sae(FIXTURES / name)
    again = load_sae(save_sae(sae, tmp_path))
    assert again.config == sae.config
    for key, value in sae.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
    ]


def test_what_is_written_has_the_names_and_shapes_of_the_fixtures(tmp_path):
    """Every key that SAELens writes of its own is written here, and the weights' names are its names."""
    for kind in ("standard", "topk", "gated", "jumprelu"):
        theirs = FIXTURES / f"{kind}_z"
        ours = save_sae(load_sae(theirs), tmp_path / kind)
        shapes = [
            {name: tuple(x.shape) for name, x in load_file(f / "sae_weights.safetensors").items()}
            for f in (theirs, ours)
        ]
        assert shapes[0] == shapes[1]
        configs = [json.loads((f / "cfg.json").read_text()) for f in (theirs, ours)]
        assert set(configs[0]) == set(configs[1])
        for key in set(configs[0]) - {"metadata"}:
            assert configs[0][key] == configs[1][key], key
        metadata = [config["metadata"] for config in configs]
        assert metadata[0]["hook_name"] == metadata[1]["hook_name"] == "blocks.3.attn.hook_z"


def test_what_saelens_has_no_place_for_comes_back(tmp_path):
    config = SAEConfig(
        d_in=8, d_sae=16, activation="batchtopk", k=4, prefixes=(4, 16), site="z.2", heads=2,
        model="tiny", sha256="ab" * 32,
    )  # fmt: skip
    sae = SAE(config, seed=2)
    with torch.no_grad():
        sae.threshold.fill_(0.7)
    folder = save_sae(sae, tmp_path)
    assert json.loads((folder / "cfg.json").read_text())["architecture"] == "jumprelu"
    assert load_sae(folder).config == config
    one_head = SAE(SAEConfig(d_in=8, d_sae=16, k=4, site="z.2.1"))
    saved = json.loads((save_sae(one_head, tmp_path / "head") / "cfg.json").read_text())
    assert saved["metadata"]["hook_head_index"] == 1 and saved["reshape_activations"] == "none"
    assert load_sae(tmp_path / "head").config.site == "z.2.1"


def test_hook_names_are_read_back_as_their_site():
    for site, hook in HOOKS.items():
        assert site in AXES and Site.parse(f"blocks.4.{hook}") == Site(site, 4)


# --- SAELens: what is refused, and what is folded ---------------------------------------------------


def changed(tmp_path: Path, name: str = "standard", weights=None, **config) -> Path:
    folder = tmp_path / "sae"
    shutil.copytree(FIXTURES / name, folder, dirs_exist_ok=True)
    raw = json.loads((folder / "cfg.json").read_text()) | config
    (folder / "cfg.json").write_text(json.dumps(raw))
    if weights is not None:
        path = folder / "sae_weights.safetensors"
        save_file({**load_file(path), **weights}, path)
    return folder


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"architecture": "transcoder"}, "architecture 'transcoder' is not supported"),
        ({"architecture": "temporal"}, "architecture 'temporal' is not supported"),
        ({"architecture": "abstopk"}, "architecture 'abstopk' is not supported"),
        ({"activation_fn_str": "tanh-relu"}, "activation 'tanh-relu' is not supported"),
        ({"normalize_activations": "layer_norm"}, "'layer_norm' is not supported"),
        ({"normalize_activations": "constant_norm_rescale"}, "'constant_norm_rescale' is not"),
        ({"normalize_activations": "covariance_whitening"}, "'covariance_whitening' is not"),
        (
            {"weights": {"scaling_factor": torch.full((16,), 2.0)}},
            "finetuned with a scaling factor",
        ),
        ({"weights": {"W_skip": torch.ones(8, 8)}}, "weights W_skip are not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, config, match):
    with pytest.raises(Refused, match=match):
        load_sae(changed(tmp_path, **config))


def test_a_factor_on_the_inputs_is_asked_for_and_folded(tmp_path):
    folder = changed(tmp_path, normalize_activations="expected_average_only_in")
    with pytest.raises(BadInput, match="give it as input_scale="):
        load_sae(folder)
    plain, scaled = load_sae(FIXTURES / "standard"), load_sae(folder, input_scale=2.5)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scaled(x), plain(2.5 * x) / 2.5)
    torch.testing.assert_close(scaled.encode(x), plain.encode(2.5 * x))
    # A factor of one for each latent is what older files carry, and means nothing.
    ones = changed(tmp_path / "b", weights={"scaling_factor": torch.ones(16)})
    torch.testing.assert_close(load_sae(ones)(x), plain(x))


def test_a_hook_that_is_not_known_needs_a_site(tmp_path):
    folder = changed(tmp_path, metadata={"hook_name": "blocks.3.hook_mlp_in"})
    with pytest.raises(BadInput, match="give site= to say where it reads"):
        load_sae(folder)
    assert load_sae(folder, site="resid_mid.3").config.site == "resid_mid.3"


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(BadInput, match=r"no SAE at .*nowhere: looked for"):
        load_sae(tmp_path / "nowhere")
    folder = changed(tmp_path)
    (folder / "sae_weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadInput, match=r"sae_weights\.safetensors is damaged"):
        load_sae(folder)
    folder = changed(tmp_path / "b")
    (folder / "cfg.json").write_text("{")
    with pytest.raises(BadInput, match=r"cfg\.json is damaged"):
        load_sae(folder)
    folder = changed(tmp_path / "c", weights={"b_enc": torch.zeros(7)})
    with pytest.raises(BadInput, match=r"b_enc has shape \(7,\), wanted \(16,\)"):
        load_sae(folder)


# --- the other formats -----------------------------------------------------------------------------


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_sparsify(tmp_path):
    """encoder.weight [latents, d_in] on x − b_dec; the k largest of relu; W_dec [latents, d_in]."""
    state = {
        "encoder.weight": numbers(16, 8),
        "encoder.bias": numbers(16, seed=1),
        "W_dec": numbers(16, 8, seed=2),
        "b_dec": numbers(8, seed=3),
    }
    folder = tmp_path / "layers.5"
    folder.mkdir()
    save_file(state, folder / "sae.safetensors")
    config = {"activation": "topk", "expansion_factor": 2, "num_latents": 0, "k": 3, "d_in": 8}
    config |= {"normalize_decoder": True, "multi_topk": False, "transcode": False}
    (folder / "cfg.json").write_text(json.dumps(config))
    sae = load_sae(folder)
    x = numbers(6, 8, seed=4)
    pre = torch.relu((x - state["b_dec"]) @ state["encoder.weight"].T + state["encoder.bias"])
    best = pre.topk(3)
    f = torch.zeros_like(pre).scatter(-1, best.indices, best.values)
    agree(sae, {"x": x, "f": f, "made": f @ state["W_dec"] + state["b_dec"]})
    assert sae.config.site == "resid_post.5"
    for option, value in (("transcode", True), ("skip_connection", True), ("signed", True)):
        (folder / "cfg.json").write_text(json.dumps(config | {option: value}))
        with pytest.raises(Refused, match=f"option '{option}' is not supported"):
            load_sae(folder)
    (folder / "cfg.json").write_text(json.dumps(config | {"activation": "groupmax"}))
    with pytest.raises(Refused, match="activation 'groupmax'"):
        load_sae(folder)


def dictionary_learning(name: str) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """(state dict, x, latents, reconstruction) of a class of that package, by its formulas."""
    x = numbers(6, 8, seed=9)
    W_e, W_d, b_e, b_d = (
        numbers(16, 8),
        numbers(8, 16, seed=1),
        numbers(16, seed=2),
        numbers(8, seed=3),
    )
    linear = {"encoder.weight": W_e, "encoder.bias": b_e, "decoder.weight": W_d}
    plain = {"W_enc": W_e.T, "b_enc": b_e, "W_dec": W_d.T, "b_dec": b_d}
    pre = ((x - b_d) @ W_e.T + b_e).relu()
    k = {"k": torch.tensor(3, dtype=torch.int)}
    if name == "AutoEncoder":
        return {**linear, "bias": b_d}, x, pre, pre @ W_d.T + b_d
    if name == "AutoEncoderNew":
        f = (x @ W_e.T + b_e).relu()
        return {**linear, "decoder.bias": b_d}, x, f, f @ W_d.T + b_d
    if name == "AutoEncoderTopK":
        best = pre.topk(3)
        f = torch.zeros_like(pre).scatter(-1, best.indices, best.values)
        state = {**linear, "b_dec": b_d, "threshold": torch.tensor(0.5), **k}
        return state, x, f, f @ W_d.T + b_d
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        f = pre * (pre > 0.8)
        state = {**linear, "b_dec": b_d} if name == "BatchTopKSAE" else dict(plain)
        if name.startswith("M"):
            state["group_sizes"] = torch.tensor([4, 12])
        return {**state, "threshold": torch.tensor(0.8), **k}, x, f, f @ W_d.T + b_d
    if name == "JumpReluAutoEncoder":
        threshold = numbers(16, seed=5).abs()
        raw = x @ W_e.T + b_e
        f = (raw * (raw > threshold)).relu()
        return {**plain, "threshold": threshold}, x, f, f @ W_d.T + b_d
    r_mag, b_mag = 0.1 * numbers(16, seed=6), numbers(16, seed=7)
    product = (x - b_d) @ W_e.T
    f = (product + b_e > 0) * (r_mag.exp() * product + b_mag).relu()
    state = {"encoder.weight": W_e, "decoder.weight": W_d, "decoder_bias": b_d}
    return {**state, "gate_bias": b_e, "mag_bias": b_mag, "r_mag": r_mag}, x, f, f @ W_d.T + b_d


@pytest.mark.parametrize("name", DICTIONARIES)
def test_dictionary_learning(name, tmp_path):
    state, x, f, made = dictionary_learning(name)
    torch.save(state, tmp_path / "ae.pt")
    trainer = {"dict_class": name, "layer": 4, "lm_name": "pythia", "k": 3}
    trainer["submodule_name"] = "resid_post_layer_4"
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    sae = load_sae(tmp_path)
    agree(sae, {"x": x, "f": f, "made": made})
    assert sae.config.site == "resid_post.4" and sae.config.model == "pythia"
    assert torch.equal(load_sae(tmp_path / "ae.pt")(x), sae(x))
    if name.startswith("Matryoshka"):
        assert sae.config.prefixes == (4, 16)
    torch.save({**state, "extra": torch.ones(2)}, tmp_path / "ae.pt")
    with pytest.raises(Refused, match="weights extra are not supported"):
        load_sae(tmp_path)


def test_dictionaries_that_are_not_known(tmp_path):
    torch.save({}, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "CrossCoder"}}))
    with pytest.raises(Refused, match="dictionary class 'CrossCoder' is not supported"):
        load_sae(tmp_path)


def test_kissane_files(tmp_path):
    """relu((x − b_dec) W_enc + b_enc) W_dec + b_dec on concatenated z."""
    state = {
        "W_enc": numbers(8, 16),
        "W_dec": numbers(16, 8, seed=1),
        "b_enc": numbers(16, seed=2),
        "b_dec": numbers(8, seed=3),
    }
    path = tmp_path / "gpt2-small_L5_Hcat_z_lr1.20e-03_l11.00e+00_ds16_bs4096.pt"
    torch.save(state, path)
    with pytest.raises(BadInput, match=r"has no .*_cfg\.json beside it"):
        load_sae(path)
    about = {"act_name": "blocks.5.attn.hook_z", "act_size": 8, "dict_size": 16, "layer": 5}
    path.with_name(path.stem + "_cfg.json").write_text(json.dumps(about))
    sae = load_sae(path, model="gpt2-small")
    x = numbers(6, 8, seed=4)
    f = torch.relu((x - state["b_dec"]) @ state["W_enc"] + state["b_enc"])
    agree(sae, {"x": x, "f": f, "made": f @ state["W_dec"] + state["b_dec"]})
    assert (sae.config.site, sae.config.model) == ("z.5", "gpt2-small")


def test_no_code_from_a_file_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"W_enc": Trap()}, tmp_path / "bad.pt")
    (tmp_path / "bad_cfg.json").write_text(json.dumps({"act_name": "blocks.5.attn.hook_z"}))
    with pytest.raises(Refused, match="no code from files is run"):
        load_sae(tmp_path / "bad.pt")
    assert not (tmp_path / "sprung").exists()
