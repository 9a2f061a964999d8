"""What heads do and how they work together; built on `interp`, never on `probes`."""

from circuits.heads.classify import classify_heads

__all__ = ["classify_heads"]
