"""How much each input token matters.

Chefer's relevance of every token to the prediction; `report.figure("relevance", score="rollout")` shows another.
"""

import circuits
import interp

model = interp.load()
prompt = "The keys to the old wooden cabinet"
report = circuits.information_flow(model, prompt, max_flow=False, words=0)
figure = report.figure("relevance")
