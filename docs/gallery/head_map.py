"""Which heads are induction heads.

The mean attention of every head to the token that followed the current one last time, on repeated random
tokens; labelled heads carry the letters of their roles.
"""

import circuits
import interp

model = interp.load()
report = circuits.classify_heads(model, prompts=8, ablate=False, evidence=0)
figure = report.figure("map", score="induction")
