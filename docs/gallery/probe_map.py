"""Where the tense of a sentence can be read.

Balanced accuracy of a ridge probe on every block's output, beside what memorising words would give.
"""

import interp
from probes.linear import linear_probes

model = interp.load()
report = linear_probes(model, "tense", random_model=False, progress=False)
figure = report.figure("map")
