"""What every layer believes comes next.

The residual stream after each block, unembedded as if it were the last: the top token of each place.
"""

import interp
from interp.lens import logit_lens

model = interp.load()
report = logit_lens(model, "The capital of France is the city of", lens="logit")
figure = report.figure("map")
