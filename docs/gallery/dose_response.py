"""How far a steering vector moves the next word.

Praise minus complaint, added to the residual stream at every strength, beside random vectors as long.
"""

import interp
from probes.vectors.steering import vector_steer

model = interp.load()
report = vector_steer(model, "sentiment", random=4, progress=False)
figure = report.figure("dose")
