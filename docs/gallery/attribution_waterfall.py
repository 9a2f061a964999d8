"""What speaks for Mary.

Each step is what heads or an MLP add to the logit difference Mary − John; together they are exactly it.
"""

import circuits
import interp

model = interp.load()
report = circuits.direct_attribution(
    model,
    "When Mary and John went to the store, John gave a drink to",
    answer=" Mary",
    instead=" John",
)
figure = report.figure("waterfall")
