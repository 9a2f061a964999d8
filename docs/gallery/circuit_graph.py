"""A circuit for naming the indirect object.

The strongest edges by EAP-IG that lead from the embedding to the logits; the slider shows more of them.
"""

import interp
from circuits.circuit_find import circuit_find

model = interp.load()
report = circuit_find(model, "ioi", method="eap-ig", edges=100, n=4, progress=False)
figure = report.figure("graph")
