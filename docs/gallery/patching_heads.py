"""Which heads name the indirect object.

Each head's z from the clean prompt, put into the corrupted one: the share of the logit difference that comes
back. All heads to first order, the strongest exactly.
"""

import interp
from circuits.patching import patch

model = interp.load()
report = patch(model, "ioi", n=8, screen=True, progress=False)
figure = report.figure("map")
