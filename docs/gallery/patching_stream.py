"""Where the subject of a fact is read.

The residual stream of one prompt, restored layer by layer and position by position in its corrupted twin.
"""

import interp
from circuits.patching import patch

model = interp.load()
report = patch(
    model,
    "facts:capital",
    site="resid_post",
    n=4,
    positions=["subject", "end"],
    progress=False,
)
figure = report.figure("map")
