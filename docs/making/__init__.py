"""Makes pages of the site from the registry, from signatures and docstrings, and from gallery scripts."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
