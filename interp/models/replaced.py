"""Models that put other modules in place of their own when they are called, as some do for short inputs."""

from __future__ import annotations

from torch import nn


def kinds(module: nn.Module) -> dict[str, type]:
    """The class of each part, by its name.

    >>> kinds(nn.Sequential(nn.ReLU()))
    {'': <class 'torch.nn.modules.container.Sequential'>, '0': <class 'torch.nn.modules.activation.ReLU'>}
    """
    return {name: type(part) for name, part in module.named_modules()}


def note(before: dict[str, type], after: dict[str, type]) -> tuple[str, ...]:
    """What to say of a model whose own forward has replaced parts; nothing where all are what they were."""
    changed = [name for name in before if name in after and after[name] is not before[name]]
    if not changed:
        return ()
    was, is_now = before[changed[0]].__name__, after[changed[0]].__name__
    return (
        f"called on the short input of the probe, the model put {is_now} in place of {was} in {len(changed)} of "
        f"its modules ('{changed[0]}'): it goes on computing so, on longer inputs too",
    )
