"""The paths that are asked for by name: senders, and receivers that read what they wrote."""

from __future__ import annotations

from collections.abc import Sequence

from circuits.graph import Receiver, Sender
from interp.errors import BadInput
from interp.models.model import Model

PARTS = ("q", "k", "v")
Names = str | Sequence[str]
Path = tuple[Sender, Receiver]


def split_names(names: Names) -> list[str]:
    parts = names.split(",") if isinstance(names, str) else list(names)
    return [part.strip() for part in parts if part.strip()]


def parsed(name: str, *, receiver: bool) -> Sender | Receiver:
    """The sender or receiver that a name means; whether the model has it is not looked at."""
    kind, *rest = name.split(".")
    if kind == "mlp" and len(rest) == 1 and rest[0].isdigit():
        return (Receiver if receiver else Sender)("mlp", int(rest[0]))
    if kind.isdigit() and rest and rest[0].isdigit():
        if receiver and len(rest) == 2 and rest[1] in PARTS:
            return Receiver(rest[1], int(kind), int(rest[0]))
        if not receiver and len(rest) == 1:
            return Sender("head", int(kind), int(rest[0]))
    if receiver:
        raise BadInput(
            f"no receiver '{name}'; write 'logits', '23.0.q' (layer.head and q, k or v), 'mlp.5' or 'all'"
        )
    raise BadInput(f"no sender '{name}'; write '23.0' (layer.head), 'mlp.5', 'heads' or 'mlps'")


def paths_of(model: Model, senders: Names | None, receiver: Names, mlps: str) -> list[Path]:
    """Every pair of a sender and a receiver that reads what it wrote."""
    spec = model.spec
    heads = [Sender("head", layer, head) for layer, head in spec.heads]
    found: list[Sender] = []
    for name in split_names(senders or "heads"):
        if name == "heads":
            found += heads
        elif name == "mlps":
            found += [Sender("mlp", layer) for layer in model.layers_with("mlp_write")]
        else:
            sender = parsed(name, receiver=False)
            _check_exists(model, name, sender)
            found.append(Sender(*sender))
    wanted: list[Receiver] = []
    for name in split_names(receiver):
        if name == "all":
            wanted += [Receiver(part, *place) for place in spec.heads for part in PARTS]
        elif name == "logits":
            wanted.append(Receiver("logits", model.n_layers))
        else:
            one = parsed(name, receiver=True)
            _check_exists(model, name, one)
            wanted.append(Receiver(*one))
    if mlps == "frozen":
        model.require_sum("paths past frozen MLPs")
        model.layers_with("mlp_write")
    paths = [
        (sender, one)
        for one in dict.fromkeys(wanted)
        for sender in dict.fromkeys(found)
        if sender.layer < one.layer or _within_block(model, sender, one)
    ]
    if not paths:
        raise BadInput(
            f"no path: no sender of '{','.join(split_names(senders or 'heads'))}' comes before receiver "
            f"'{','.join(split_names(receiver))}'; name senders of earlier layers"
        )
    return paths


def _within_block(model: Model, sender: Sender, receiver: Receiver) -> bool:
    """Whether the receiver is the MLP that reads the sender's block after its attention."""
    sequential = not model.spec.blocks[sender.layer].parallel
    same = receiver.layer == sender.layer and receiver.kind == "mlp"
    return same and sender.kind == "head" and sequential


def _check_exists(model: Model, name: str, node: Sender | Receiver) -> None:
    if not node.layer < model.n_layers:
        raise BadInput(f"'{name}': layers of {model.id} are 0 to {model.n_layers - 1}")
    if node.kind == "mlp":
        if node.layer not in model.layers_with("mlp_write"):
            raise BadInput(f"'{name}': layer {node.layer} of {model.id} has no MLP write")
    elif not node.head < model.spec.blocks[node.layer].n_heads:
        last = model.spec.blocks[node.layer].n_heads - 1
        raise BadInput(f"'{name}': heads of layer {node.layer} of {model.id} are 0 to {last}")
