"""A Report is data first: tables, arrays and where they came from; pages and figures are made from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

SCHEMA_VERSION = 1


@dataclass
class Report:
    """What an analysis found. (skeleton: saving and loading follow)"""

    analysis: str
    tables: dict[str, pd.DataFrame]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
