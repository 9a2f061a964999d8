"""All attention patterns of one prompt, as a page carries them: a picture a head, one of them opened large.

The drawing is attention_grid.js (one canvas for all heads, one for the chosen one); 270 plotly heat
maps take minutes to open. `interp.figures.pattern` draws one head as a plotly figure.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from interp.report import Report


def attention_patterns(report: Report, prompt: int = 0) -> tuple[dict[str, Any], bytes] | None:
    """What the page needs to draw every pattern of a prompt; None where the report keeps none.

    Returns: the description (n tokens; causal; has: which heads exist, flat over layers and heads), and
        255·√A as bytes: head after head, of a causal model only the lower triangle, row by row.
    """
    pattern = report.arrays.get("pattern")
    if pattern is None or not pattern.size:
        return None
    grid = pattern[prompt]
    n = grid.shape[-1]
    causal = bool(report.meta.get("causal", True))
    query, key = np.tril_indices(n) if causal else map(np.ravel, np.indices((n, n)))
    kept = np.ascontiguousarray(grid[:, :, query, key], dtype=np.uint8)
    has = kept.any(-1).ravel().tolist()
    return {"n": n, "causal": causal, "has": has}, kept.tobytes()
