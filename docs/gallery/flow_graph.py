"""The route by which a prediction's information came.

What the residual stream at the last token was built from, backwards: the parts that hold most of each sum.
"""

import circuits
import interp

model = interp.load()
prompt = "When Mary and John went to the store, John gave a drink to"
report = circuits.information_flow(model, prompt, exclude_sink=True, max_flow=False, words=0)
figure = report.figure("graph")
