"""How many model types of the installed transformers verify: a tiny random model of each, probed.

For every causal language model, encoder, encoder-decoder and model of images, sound, video or anything else
that transformers' auto classes know (and the text part of multimodal ones, and types that no auto class
lists, both listed apart), the default config is shrunk by the names of its fields, a random model is built
from it, and the probe makes and verifies its map. No model type has code of its own here; what takes the
session of a video tracker or the atoms of a protein is opened on an example (`sessions.py`, `proteins.py`). An
encoder-decoder has a row of its own for its decoder, with the attention to the source, besides the row of
its encoder or of its decoder without a source. A model type is

- in full: every site that the architecture has passes its identity, and a pass that captures all of
  them returns the model's own logits (parallel blocks have no resid_mid, routed experts no single
  mlp_post, a head with a transform no one unembedding); of towers side by side, so in each as a model
  of its own, or as a stack of the whole where no part of it is one;
- partly: some site is refused, with the reason;
- residual stream only: no attention is seen, since the model has none, or computes it neither through
  transformers' attention interface nor as a softmax of rows times values (one whose config switches
  attention off is tried with it on, and the row says so);
- refused: the probe refuses the model, with the reason;
- not built: no tiny model could be made of its default config, its own forward fails on plain
  tokens or pixels, or it needs a library that is not installed, with the reason. These say nothing
  about the probe.

Each model has a process of its own, with a limit on time and memory.

Run: python -m benchmarks.architectures [--only bert,vit] [--write]
(--write makes docs/support.csv and docs/support.md). A whole sweep ends with the modelling files that call the
attention interface and have no type in full.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from itertools import product
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks import callers, proteins, sessions
from benchmarks.model_types import OTHER, SENSED, UNLISTED, WHOLE, model_types, own_classes
from benchmarks.tiny_configs import Unbuildable, attention_switches, tiny_model
from interp.errors import InterpError, Refused
from interp.models.calls import call_model, is_encoder_decoder, main_input, output_tensor
from interp.models.find_stack import SeveralStacks
from interp.models.kernels import in_float64
from interp.models.layout import shown
from interp.models.model import Model
from interp.models.named import last_returned
from interp.models.probe import probe_batch
from interp.models.taken import batch_like
from interp.run.batch import Batch
from interp.run.cache import Run
from interp.sites import AXES

SECONDS, GIGABYTES = 60, 8
"""What one model may take."""
DOCS = Path(__file__).parent.parent / "docs"
OUTCOMES = ("in full", "partly", "residual stream only", "refused", "not built")
TEXT = "text"
"""The part of a multimodal model that reads tokens, where the whole does not work on tokens alone."""
KINDS = ("decoder", "encoder", WHOLE, "vision", SENSED, OTHER, "multimodal", UNLISTED)
APART = ("multimodal", UNLISTED)
"""Kinds that are counted apart: of multimodal models the text part is tried, and the rest are parts of others."""
KIND_OF_INPUT = {
    "input_ids": "encoder",
    "pixel_values": "vision",
    **dict.fromkeys(("input_values", "input_features", "pixel_values_videos"), SENSED),
}
ROUNDING = 1e-4
"""float32, a few blocks deep: a capturing pass may form patterns where the plain one called SDPA."""


BESIDES = {"timm": "timm", "pillow": "PIL"}
"""Packages that some models cannot be built without, and what they are imported as; the sweep needs neither."""


@dataclass(frozen=True)
class Row:
    """What became of one model type."""

    model_type: str
    kind: str
    model: str
    outcome: str
    n_layers: int = 0
    n_heads: int = 0
    refused: str = ""
    reason: str = ""


def examine(model_type: str, kind: str, classes: list[str]) -> Row | None:
    """The row of one model type; None for a whole that is no encoder-decoder, or a type without a model class."""
    classes = classes or own_classes(model_type)
    if not classes:
        return None
    row = Row(model_type, kind, classes[0], "not built")
    reasons = []
    parts = (kind, TEXT) if kind == "multimodal" else (kind,)
    for of, name in product(parts, classes[:3]):
        try:
            module = _part(_tiny(model_type, name, of), of)
        except Unbuildable as error:
            needs = str(error).startswith("needs ")  # a library, whatever the class
            reasons.append(str(error) if needs else f"{name}: {error}")
            continue
        kind = kind or _kind(type(module), module.config)
        if kind == "encoder" and is_encoder_decoder(module):  # its encoder is no model of its own
            kind = WHOLE
        if kind == WHOLE and not is_encoder_decoder(module):
            return None
        row = _verified(replace(row, kind=kind, model=type(module).__name__), module)
        return _switched_on(row, name, module) if row.outcome == OUTCOMES[2] else row
    kind = kind or _declared(model_type, classes[0])
    return replace(row, kind=kind, reason="; ".join(reasons[:1]))


def _tiny(model_type: str, name: str, kind: str, **switched: bool) -> nn.Module:
    """A tiny model; one for whose input no shape is found only where no other is made."""
    try:
        return tiny_model(model_type, name, partial(runs, kind=kind, strict=True), **switched)
    except Unbuildable as error:
        if "Refused" not in str(error):
            raise
        return tiny_model(model_type, name, partial(runs, kind=kind), **switched)


def _switched_on(row: Row, name: str, module: nn.Module) -> Row:
    """The row of a model that shows no attention with attention switched on, where its config can; else `row`."""
    config: Any = module.config
    for field in attention_switches(config):
        with suppress(Unbuildable):
            attending = _part(_tiny(row.model_type, name, row.kind, **{field: True}), row.kind)
            again = _verified(row, attending)
            if again.outcome != row.outcome:
                return replace(
                    again, reason="; ".join(filter(None, (f"with {field}=True", again.reason)))
                )
    return row


def runs(module: nn.Module, kind: str = "", strict: bool = False) -> None:
    """Raise what the model's own forward raises on random inputs of its kind, or for NaN.

    `strict`: and where the probe finds no such inputs, or none of tokens for what reads tokens.
    """
    module = _part(module, kind)
    with nullcontext() if strict else suppress(Refused), torch.no_grad():
        example = _example(module)
        batch = probe_batch(module) if example is None else batch_like(module, example)
        if strict and "inputs_embeds" in batch.inputs and main_input(module) == "input_ids":
            raise Refused(f"{type(module).__name__} works on vectors in place of tokens alone")
        if not output_tensor(call_model(module, batch)).isfinite().all():
            raise ArithmeticError("its random weights give NaN")


def _example(module: nn.Module) -> dict[str, Any] | None:
    """Inputs for a forward that takes what nothing makes up; None where it takes none such."""
    return sessions.example_of(module) or proteins.example_of(module)


def _verified(row: Row, module: nn.Module, stack: str | None = None) -> Row:
    try:
        model = Model(module, id=row.model_type, stack=stack, example=_example(module))
    except SeveralStacks as error:
        return _by_parts(row, module, error)
    except InterpError as error:
        return replace(row, outcome="refused", reason=str(error))
    spec = model.spec
    row = replace(row, n_layers=spec.n_layers, n_heads=spec.n_heads)
    refused = {site: why for site, why in spec.refused.items() if site not in spec.absent}
    if "z" in refused and not spec.attention_layers:
        return replace(row, outcome="residual stream only", reason=refused["z"])
    sites = [site for site in AXES if site not in spec.refused and model.layers_with(site)]
    batch = model.probed
    run, error = _captured(model, batch, sites)
    patterns = run.cache.by_layer("pattern").values() if "pattern" in sites else ()
    of_both = bool(patterns) and all(x.shape[3] > x.shape[2] for x in patterns)  # in one softmax
    if row.kind == WHOLE and not of_both and not model.layers_with("cross_z"):
        refused["cross_z"] = "no attention of the decoder to the source was found"
    if (
        error > ROUNDING
        and not batch.objects
        and (model.spec.between_kernels or model.spec.in_float64)
    ):  # it makes much of a rounding
        exact, batch = in_float64(module, batch)
        error = _captured(Model(exact, stack=stack), batch, sites)[1]
    if error > ROUNDING:
        refused["logits"] = f"off by {error:.1e} when all sites are captured"
    missing = [site for site in spec.refused if site not in refused]
    outcome = "partly" if refused else "in full"
    reasons = dict.fromkeys(refused.values())
    shown = _sites(missing if outcome == "in full" else refused)
    return replace(row, outcome=outcome, refused=shown, reason="; ".join(reasons))


def _sites(names: Iterable[str]) -> str:
    """Sites in a line; of those that are told by layer, the layers in brackets."""
    layers: dict[str, list[str]] = {}
    for name in names:
        site, _, layer = name.partition(".")
        layers.setdefault(site, []).extend([layer] if layer else [])
    shown = (f"{site} (layers {' '.join(of)})" if of else site for site, of in layers.items())
    return ", ".join(shown)


def _captured(model: Model, batch: Batch, sites: list[str]) -> tuple[Run, float]:
    """A run that captures these sites, and how far its logits are from the model's own, relative to their size."""
    with torch.no_grad():
        plain = output_tensor(call_model(model.module, batch))
    run = model.run(batch, capture=sites)
    assert run.logits is not None
    plain = plain.reshape(run.logits.shape)  # a model that packs rows into one returns them so
    error = float((run.logits - plain).abs().max() / plain.abs().max())
    if model.spec.named and "resid_post" in sites:  # of whose layers the logits may say nothing
        with torch.no_grad():
            end = last_returned(model.spec, model.module, batch)[-1]
        end = shown(end, model.spec.hidden_axes, batch.size)
        last = run.cache[f"resid_post.{model.n_layers - 1}"]
        error = max(error, float((last - end).abs().max() / end.abs().max()))
    return run, error


def _by_parts(row: Row, module: nn.Module, refusal: SeveralStacks) -> Row:
    """The row of a model of several stacks side by side: in full where all are, in parts that are models or by name."""
    parts = list(dict.fromkeys(part for part in refusal.parts.values() if part))
    stacks = [stack for stack, part in refusal.parts.items() if not part]
    found = [_verified(row, module.get_submodule(name)) for name in parts]
    found += [_verified(row, module, stack) for stack in stacks]
    if any(part.outcome != "in full" for part in found):
        wrong = next(part for part in found if part.outcome != "in full")
        return replace(
            row,
            outcome="refused",
            reason=f"{refusal}; of them one is {wrong.outcome}: {wrong.reason}",
        )
    ways = (
        [f"as its parts side by side, each a model of its own: {', '.join(parts)}"] if parts else []
    )
    ways += [f"by stack=, in the whole: {', '.join(stacks)}"] if stacks else []
    return replace(
        row,
        outcome="in full",
        n_layers=sum(part.n_layers for part in found),
        n_heads=max(part.n_heads for part in found),
        refused=", ".join(dict.fromkeys(part.refused for part in found if part.refused)),
        reason="; ".join(ways),
    )


def _part(module: nn.Module, kind: str) -> nn.Module:
    """The encoder of an encoder-decoder in an encoder's row, else the model itself.

    An encoder that reads other things than the model (an image's features, say), or that no config tells of, is no
    model of its own.
    """
    config: Any = module.config
    if kind == TEXT:
        wanted = type(config.get_text_config())
        parts = (x for x in module.modules() if isinstance(x, PreTrainedModel) and x is not module)
        return next((x for x in parts if isinstance(x.config, wanted)), module)
    if kind == WHOLE or not getattr(config, "is_encoder_decoder", False):
        return module
    encoder: Any = module.get_encoder()  # type: ignore
    main = getattr(module, "main_input_name", "input_ids")
    alike = main in inspect.signature(type(encoder).forward).parameters
    return encoder if alike and hasattr(encoder, "config") else module


def _kind(of: type[nn.Module], config: Any) -> str:
    """Of a model that stands in none of the lists but the base models': by its main input.

    `config` may be its class, of a model that is not built.
    """
    named = getattr(of, "main_input_name", "input_ids")
    main = named if isinstance(named, str) else named[0]
    taken = inspect.signature(of.forward).parameters
    if main not in taken and ("pixel_values" in taken or any("grid" in name for name in taken)):
        main = "pixel_values"  # cut patches, of a part of a larger model
    of_parts = {*vars(config), *getattr(config, "sub_configs", {})}
    if main == "input_ids" and of_parts & {"vision_config", "text_config"}:
        return "multimodal"
    return KIND_OF_INPUT.get(main, OTHER) if main in taken or main == "pixel_values" else OTHER


def _declared(model_type: str, name: str) -> str:
    """The kind of a base model that could not be built, as its class says."""
    try:
        return _kind(getattr(transformers, name), CONFIG_MAPPING[model_type])
    except (
        ImportError,
        AttributeError,
    ):  # a class that needs a library that is not here, or is not exported
        return OTHER


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text}"[:160]


# --- one process a model -------------------------------------------------------------------------


def _child(connection: Connection, model_type: str, kind: str, classes: list[str]) -> None:
    limit = GIGABYTES * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        row = examine(model_type, kind, classes)
    except Exception as error:  # noqa: BLE001 - a fault of the probe: counted as one, never hidden
        kind = kind or _declared(model_type, classes[0])
        name = classes[0] if classes else ""
        row = Row(model_type, kind, name, "refused", reason=f"the probe fails: {_line(error)}")
    connection.send(row)
    connection.close()


def sweep(only: list[str], jobs: int) -> Iterator[Row]:
    """The rows of all model types (or of those named), as they come."""
    waiting = [row for row in model_types() if not only or row[0] in only]
    context = multiprocessing.get_context("fork")
    running: dict[Connection, tuple[Any, Row, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name, kind, classes = waiting.pop(0)
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(theirs, name, kind, classes))
            process.start()
            theirs.close()
            first = classes[0] if classes else ""
            unknown = Row(name, kind or _declared(name, first), first, "not built")
            running[mine] = (process, unknown, time.monotonic())
        ready = wait(list(running), timeout=1)
        for connection, (process, row, since) in list(running.items()):
            if connection in ready:
                try:
                    answer = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    answer = replace(row, reason=f"its process died, over {GIGABYTES} GB perhaps")
            elif time.monotonic() - since > SECONDS:
                process.terminate()
                answer = replace(row, reason=f"took more than {SECONDS} s")
            else:
                continue
            process.join()
            connection.close()
            del running[connection]
            if answer is not None:
                yield answer


# --- the table ---------------------------------------------------------------------------------


def counts(rows: list[Row]) -> str:
    """How many model types came out how, by kind, and the total of those asked for."""
    count = Counter((row.kind, row.outcome) for row in rows)
    width = {each: len(each) + 2 for each in OUTCOMES}
    lines = [f"{'':16}" + "".join(f"{each:>{width[each]}}" for each in OUTCOMES)]
    for kind in KINDS:
        cells = (f"{count[kind, each]:>{width[each]}}" for each in OUTCOMES)
        lines.append(f"{kind:16}" + "".join(cells))
    asked: dict[str, list[str]] = {}
    for row in rows:
        if row.kind not in APART:
            asked.setdefault(row.model_type, []).append(row.outcome)
    full = sum(set(outcomes) == {"in full"} for outcomes in asked.values())
    built = sum(set(outcomes) != {"not built"} for outcomes in asked.values())
    more, parts = (count[kind, "in full"] for kind in APART)
    lines.append(
        f"{full} model types verified in full, of {built} built and {len(asked)} known (all kinds but the\n"
        f"last two; of encoder-decoders every row); {more} multimodal ones besides, by their text, and\n"
        f"{parts} that no auto class lists, parts of larger models most of them"
    )
    return "\n".join(lines)


def libraries() -> str:
    """What models were built with: transformers, and of what some need besides whatever is installed."""
    found = []
    for name, wanted in BESIDES.items():
        with suppress(metadata.PackageNotFoundError):
            if find_spec(wanted):
                found.append(f"{name} {metadata.version(name)}")
    besides = f" with {' and '.join(found)}" if found else ""
    return f"transformers {transformers.__version__}{besides}"


def markdown(rows: list[Row]) -> str:
    """The support table as a page."""
    parts = [
        "# Which models are supported",
        f"Made by `python -m benchmarks.architectures --write` with {libraries()}: a tiny random "
        "model of every model type that the library can "
        "build, its map discovered and every identity tried. A model type is *in full* where every "
        "site its architecture has passes; other rows say what is refused and why. Types that could "
        "not be built from a shrunken default config are listed too: of them nothing is known. A model of "
        "towers side by side is tried as its parts, each a model of its own, and as stacks of the whole by "
        "name where they are in none. "
        "Whatever a table says, `interp inspect MODEL` tries the identities on your own model.",
        "```text\n" + counts(rows) + "\n```",
        "```text\n" + callers.summary(rows) + "\n```",
    ]
    for kind in KINDS:
        parts.append(f"## {kind.capitalize()}")
        lines = ["| model type | class | outcome | sites | reason |", "|---|---|---|---|---|"]
        for row in (row for row in rows if row.kind == kind):
            sites = f"without {row.refused}" if row.refused else ""
            reason = row.reason.replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| {row.model_type} | {row.model} | {row.outcome} | {sites} | {reason} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Probe a tiny model of every model type.")
    parser.add_argument("--only", default="", help="model types, separated by commas")
    parser.add_argument("--write", action="store_true", help="write docs/support.{csv,md}")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    options = parser.parse_args()
    only = [name for name in options.only.split(",") if name]
    rows = []
    for row in sweep(only, options.jobs):
        rows.append(row)
        print(f"{row.model_type:28}{row.kind:16}{row.outcome:21}{row.refused}  {row.reason}"[:300])
        sys.stdout.flush()
    rows.sort(key=lambda row: (row.kind, row.model_type))
    print(f"{counts(rows)}\n({libraries()})")
    if not only:
        print(callers.summary(rows))
    if options.write and not only:
        table = [asdict(row) for row in rows]
        DOCS.mkdir(exist_ok=True)
        with (DOCS / "support.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(table[0]))
            writer.writeheader()
            writer.writerows(table)
        (DOCS / "support.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
