"""Massive activations by layer.

The largest entries of the residual stream beside their median: a few dimensions of the first token.
"""

import interp
from circuits.heads.massive import massive

model = interp.load()
report = massive(model, n=4, intervene=False, progress=False)
figure = report.figure("layers")
