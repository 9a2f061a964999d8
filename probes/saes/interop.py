"""SAE files of the field: SAELens folders read and written, three other formats read.

Each format is a table of names and a few rules; what a table does not know is refused by name, so
that no published SAE is read as something that it is not.

SAELens, version 6 and older (`cfg.json`, `sae_weights.safetensors`)
    read: standard, topk, gated, jumprelu, batchtopk, matryoshka_batchtopk; written too.
    refused: transcoders, temporal, abstopk, matching pursuit; inputs that are normalised row by row
    or whitened; a finetuning factor for each latent.
sparsify (`cfg.json`, `sae.safetensors`)
    read: topk. refused: groupmax, signed, transcoders, skip connections.
dictionary_learning (`ae.pt`, `config.json`)
    read: the classes in `DICTIONARIES`. refused: others.
Kissane et al. (`NAME.pt`, `NAME_cfg.json`)
    read: their SAEs on concatenated z.

`.pt` files are opened with `weights_only=True`: they hold tensors, and no code of theirs is run.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from interp.errors import BadInput, Refused, unknown
from interp.run.files import write_together
from interp.sites import Site
from probes.saes.model import SAE, SAEConfig

SAELENS_VERSION = "6.0.0"
"""The version of the format that is written; SAELens takes files without one for older ones."""

HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_write": "hook_attn_out",
    "mlp_write": "hook_mlp_out",
    "mlp_post": "mlp.hook_post",
    "q": "attn.hook_rot_q",
    "k": "attn.hook_rot_k",
    "v": "attn.hook_v",
    "z": "attn.hook_z",
}
"""What TransformerLens calls a site."""

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"


def save_sae(sae: SAE, folder: str | Path) -> Path:
    """Write a SAELens folder: `cfg.json` and `sae_weights.safetensors`.

    A batchtopk SAE is written as the jumprelu SAE that it is once trained, as SAELens does. What
    SAELens has no place for (site, heads, weights hash, prefixes) stands in the config's metadata,
    under "interp", and is read back.

    Raises:
        SaveFailed: the folder cannot be written.
    """
    c = sae.config
    architecture = {"relu": "standard", "batchtopk": "jumprelu"}.get(c.activation, c.activation)
    tensors = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if c.activation == "gated":
        tensors |= {"b_gate": sae.b_enc, "b_mag": sae.b_mag, "r_mag": sae.r_mag}
    else:
        tensors["b_enc"] = sae.b_enc
    if architecture == "jumprelu":
        tensors["threshold"] = sae.threshold
    site = Site.parse(c.site) if c.site else None
    ours = {"activation": c.activation, "k": c.k, "prefixes": list(c.prefixes), "site": c.site}
    metadata = {
        "sae_lens_version": SAELENS_VERSION,
        "sae_lens_training_version": None,
        "model_name": c.model,
        "hook_name": _hook(site),
        "hook_head_index": None if site is None else site.head,
        "interp": ours | {"heads": c.heads, "sha256": c.sha256},
    }
    whole_z = site is not None and site.name == "z" and site.head is None
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": c.d_in,
        "d_sae": c.d_sae,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": c.centre,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if whole_z else "none",
        "metadata": metadata,
    }
    if architecture == "topk":
        config |= {"k": c.k, "rescale_acts_by_decoder_norm": False}
    content = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    folder = Path(folder)
    files = {WEIGHTS: save(content), CONFIG: json.dumps(config, indent=1).encode()}
    write_together(folder, files)
    return folder


def load_sae(
    path: str | Path, *, site: str = "", model: str = "", input_scale: float | None = None
) -> SAE:
    """An SAE from any of the formats above, told apart by their files; float32, on the CPU.

    Args:
        path: the folder, or for Kissane's files the `.pt`.
        site: where it reads, for files that do not say so or whose name for it is not known here.
        model: what it was trained on, for files that do not say so.
        input_scale: the factor that inputs are multiplied by, for SAELens files with
            `normalize_activations: expected_average_only_in`, which do not carry it.

    Raises:
        BadInput: no such files, damaged or unexpected ones. Refused: a kind of SAE that is not
            supported, by name.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".pt" and path.name != "ae.pt":
        config, state = _kissane(path)
    elif (path / WEIGHTS).exists():
        config, state = _saelens(path, site, input_scale)
    elif (path / "sae.safetensors").exists():
        config, state = _sparsify(path)
    elif (path / "ae.pt").exists() or path.name == "ae.pt":
        config, state = _dictionary_learning(path.parent if path.name == "ae.pt" else path)
    else:
        raise BadInput(
            f"no SAE at {path}: looked for {CONFIG} with {WEIGHTS} (SAELens) or sae.safetensors "
            "(sparsify), ae.pt (dictionary_learning), or a .pt file (Kissane et al.)"
        )
    config = replace(config, **{k: v for k, v in {"site": site, "model": model}.items() if v})
    return _built(config, state, path)


def _built(config: SAEConfig, state: Mapping[str, Tensor], path: Path) -> SAE:
    """The module with these weights; every name and shape must fit."""
    sae = SAE(config)
    wanted = dict(sae.named_parameters())
    if extra := sorted(set(state) - set(wanted)):
        raise Refused(
            f"{path} has weights that a {config.activation} SAE has not: {', '.join(extra)}"
        )
    for name, parameter in wanted.items():
        if name not in state:
            raise BadInput(f"{path} has no {name}, which a {config.activation} SAE needs")
        value = state[name]
        if value.shape != parameter.shape:
            raise BadInput(
                f"{path}: {name} has shape {tuple(value.shape)}, wanted {tuple(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(value)
    return sae.eval()


# --- SAELens ---------------------------------------------------------------------------------------

ARCHITECTURES = {
    "standard": "relu",
    "topk": "topk",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "batchtopk",
}
OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
"""What SAELens before version 6 called it."""

SAELENS_WEIGHTS = {
    "W_enc": "encoder",
    "W_dec": "W_dec",
    "b_enc": "b_enc",
    "b_gate": "b_enc",
    "b_dec": "b_dec",
    "b_mag": "b_mag",
    "r_mag": "r_mag",
    "threshold": "threshold",
    "topk_threshold": "threshold",
}
ROW_BY_ROW = ("layer_norm", "constant_norm_rescale", "covariance_whitening")
ACTIVATIONS_BEFORE_6 = ("relu", "topk")


def _saelens(
    path: Path, known_site: str, input_scale: float | None
) -> tuple[SAEConfig, dict[str, Tensor]]:
    raw = {OLD_NAMES.get(name, name): value for name, value in _json(path / CONFIG).items()}
    about = {**raw, **(raw.get("metadata") or {})}
    ours = about.get("interp") or {}
    architecture = raw.get("architecture", "standard")
    k = raw.get("k") or (raw.get("activation_fn_kwargs") or {}).get("k")
    function = raw.get("activation_fn", "relu")
    if architecture == "standard" and function != "relu":
        if function not in ACTIVATIONS_BEFORE_6:
            raise Refused(f"{path}: activation '{function}' is not supported; known: relu, topk")
        architecture = function
    if architecture not in ARCHITECTURES:
        raise Refused(
            f"{path}: architecture '{architecture}' is not supported; known: {', '.join(ARCHITECTURES)}"
        )
    state = _tensors(path / WEIGHTS)
    factor = state.pop("scaling_factor", state.pop("finetuning_scaling_factor", None))
    if factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
        raise Refused(f"{path}: finetuned with a scaling factor a latent, which is not supported")
    if surplus := sorted(set(state) - set(SAELENS_WEIGHTS)):
        raise Refused(f"{path}: weights {', '.join(surplus)} are not supported")
    state = {SAELENS_WEIGHTS[name]: value.float() for name, value in state.items()}
    state["encoder"] = state["encoder"].T
    if "threshold" in state and state["threshold"].ndim == 0:
        state["threshold"] = state["threshold"].repeat(len(state["encoder"]))
    _fold_rescaling(state, raw)
    _fold_input_scale(state, raw.get("normalize_activations"), input_scale, path)
    d_sae, d_in = state["W_dec"].shape
    activation = ours.get("activation", ARCHITECTURES[architecture])
    site = known_site or ours.get("site") or _site(about, path)
    return (
        SAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            activation=activation,
            k=ours.get("k", None if k is None else round(k)),
            prefixes=tuple(ours.get("prefixes", ())),
            centre=bool(raw.get("apply_b_dec_to_input", True)),
            site=site,
            heads=int(ours.get("heads", 0)),
            model=about.get("model_name") or "",
            sha256=ours.get("sha256", ""),
        ),
        state,
    )


def _fold_rescaling(state: dict[str, Tensor], raw: Mapping[str, Any]) -> None:
    """`rescale_acts_by_decoder_norm`: latents are chosen as if decoder rows had norm 1; now they have."""
    if not raw.get("rescale_acts_by_decoder_norm", False):
        return
    norm = state["W_dec"].norm(dim=1)
    state["W_dec"] = state["W_dec"] / norm[:, None]
    state["encoder"] = state["encoder"] * norm[:, None]
    state["b_enc"] = state["b_enc"] * norm


def _fold_input_scale(
    state: dict[str, Tensor], normalisation: Any, scale: float | None, path: Path
) -> None:
    """One factor for all inputs is folded into the weights; everything else is refused."""
    if normalisation in ROW_BY_ROW:
        raise Refused(
            f"{path}: normalize_activations '{normalisation}' is not supported: inputs are "
            "normalised row by row or whitened before the encoder"
        )
    if normalisation in (None, False, "none"):
        return
    if normalisation not in (True, "expected_average_only_in"):
        raise unknown("normalize_activations", str(normalisation), ("none", *ROW_BY_ROW))
    if scale is None:
        raise BadInput(
            f"{path} was trained on inputs times a factor that its files do not carry "
            "(expected_average_only_in): give it as input_scale="
        )
    state["encoder"] = state["encoder"] * scale
    state["W_dec"] = state["W_dec"] / scale
    state["b_dec"] = state["b_dec"] / scale


def _site(about: Mapping[str, Any], path: Path) -> str:
    hook, head = about.get("hook_name"), about.get("hook_head_index")
    if not hook:
        return ""
    try:
        site = Site.parse(hook)
    except BadInput as error:
        raise BadInput(f"{path}: {error}; give site= to say where it reads") from error
    return str(site if head is None else Site(site.name, site.layer, int(head)))


def _hook(site: Site | None) -> str | None:
    """TransformerLens's name of a site; our own where it has none."""
    if site is None:
        return None
    return f"blocks.{site.layer}.{HOOKS[site.name]}" if site.name in HOOKS else str(site)


# --- sparsify --------------------------------------------------------------------------------------


def _sparsify(path: Path) -> tuple[SAEConfig, dict[str, Tensor]]:
    raw = _json(path / CONFIG)
    if (activation := raw.get("activation", "topk")) != "topk":
        raise Refused(f"{path}: activation '{activation}' is not supported; known: topk")
    for option in ("transcode", "skip_connection", "signed"):
        if raw.get(option):
            raise Refused(f"{path}: sparsify's option '{option}' is not supported")
    state = _renamed(
        _tensors(path / "sae.safetensors"),
        {
            "encoder.weight": "encoder",
            "encoder.bias": "b_enc",
            "W_dec": "W_dec",
            "b_dec": "b_dec",
        },
        path,
    )
    d_sae, d_in = state["encoder"].shape
    match = re.fullmatch(r"layers\.(\d+)", path.name)
    site = f"resid_post.{match[1]}" if match else ""
    config = SAEConfig(d_in=d_in, d_sae=d_sae, activation="topk", k=raw["k"], site=site)
    return config, state


# --- dictionary_learning ---------------------------------------------------------------------------

_LINEAR = {"encoder.weight": "encoder", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_PLAIN = {name: name for name in ("b_enc", "W_dec", "b_dec", "threshold")} | {"W_enc": "encoder"}
DICTIONARIES: dict[str, tuple[str, bool, dict[str, str]]] = {
    "AutoEncoder": ("relu", True, _LINEAR | {"bias": "b_dec"}),
    "AutoEncoderNew": ("relu", False, _LINEAR | {"decoder.bias": "b_dec"}),
    "AutoEncoderTopK": ("topk", True, _LINEAR | {"b_dec": "b_dec"}),
    "BatchTopKSAE": ("batchtopk", True, _LINEAR | {"b_dec": "b_dec", "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": ("batchtopk", True, _PLAIN),
    "JumpReluAutoEncoder": ("jumprelu", False, _PLAIN),
    "GatedAutoEncoder": (
        "gated",
        True,
        {
            "encoder.weight": "encoder",
            "decoder.weight": "W_dec",
            "decoder_bias": "b_dec",
            "gate_bias": "b_enc",
            "mag_bias": "b_mag",
            "r_mag": "r_mag",
        },
    ),
}
"""Class: (activation, whether b_dec is subtracted from the input, names of the weights)."""


def _dictionary_learning(path: Path) -> tuple[SAEConfig, dict[str, Tensor]]:
    raw = _json(path / "config.json").get("trainer", {})
    name = raw.get("dict_class", "")
    if name not in DICTIONARIES:
        raise Refused(
            f"{path}: dictionary class '{name}' is not supported; known: {', '.join(DICTIONARIES)}"
        )
    activation, centre, names = DICTIONARIES[name]
    found = _torch_file(path / "ae.pt")
    sizes = found.pop("group_sizes", None)
    k = found.pop("k", raw.get("k"))
    if activation == "topk":
        found.pop("threshold", None)  # kept by the trainer; its encoder takes k a row
    state = _renamed(found, names, path)
    if "W_enc" in found:
        state["encoder"] = state["encoder"].T
    if "decoder.weight" in found:
        state["W_dec"] = state["W_dec"].T
    d_sae, d_in = state["W_dec"].shape
    if "threshold" in state and state["threshold"].ndim == 0:
        state["threshold"] = state["threshold"].repeat(d_sae)
    layer, place = raw.get("layer"), raw.get("submodule_name") or ""
    site = f"resid_post.{layer}" if place.startswith("resid_post") else ""
    config = SAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        activation=activation,
        k=None if k is None or activation in ("relu", "gated") else int(k),
        prefixes=() if sizes is None else tuple(sizes.cumsum(0).tolist()),
        centre=centre,
        site=site,
        model=raw.get("lm_name") or "",
    )
    return config, state


# --- Kissane et al. --------------------------------------------------------------------------------


def _kissane(path: Path) -> tuple[SAEConfig, dict[str, Tensor]]:
    about = path.with_name(path.stem + "_cfg.json")
    if not about.exists():
        raise BadInput(f"{path} has no {about.name} beside it, which says its site and sizes")
    raw = _json(about)
    names = {"W_enc": "encoder", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
    state = _renamed(_torch_file(path), names, path)
    state["encoder"] = state["encoder"].T
    d_sae, d_in = state["W_dec"].shape
    site = _site({"hook_name": raw.get("act_name")}, path)
    model = raw.get("model_name") or ""
    return SAEConfig(d_in=d_in, d_sae=d_sae, activation="relu", site=site, model=model), state


# --- files -----------------------------------------------------------------------------------------


def _renamed(
    found: Mapping[str, Tensor], names: Mapping[str, str], path: Path
) -> dict[str, Tensor]:
    if surplus := sorted(set(found) - set(names)):
        raise Refused(f"{path}: weights {', '.join(surplus)} are not supported")
    if missing := sorted(set(names) - set(found)):
        raise BadInput(f"{path} has no {missing[0]}; it has {', '.join(sorted(found))}")
    return {names[name]: value.float() for name, value in found.items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"no {path.name} in {path.parent}") from error
    except json.JSONDecodeError as error:
        raise BadInput(f"{path} is damaged: {error}") from error


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise BadInput(f"{path} is damaged: {error}") from error


def _torch_file(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise Refused(f"{path} holds more than tensors, and no code from files is run") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise BadInput(f"{path} is damaged or missing: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise Refused(f"{path} is not a dictionary of tensors by name")
    return dict(found)
