"""What the strongest induction head looks at.

Its pattern on 24 random tokens, said twice: the stripe is the token after the earlier copy. The root of the
weight is shown, so that small weights can be seen too.
"""

import plotly.express as px

import circuits
import interp
from interp.data.prompts import repeated_tokens

model = interp.load()
report = circuits.classify_heads(
    model, detectors=["induction"], prompts=4, ablate=False, evidence=0
)
layer, head = report.table.nlargest(1, "induction")[["layer", "head"]].values[0]

prompts, _ = repeated_tokens(model, 1, length=24)
run = model.run(prompts.batch, capture=[f"pattern.{layer}"], logits=False)
pattern = run.cache[f"pattern.{layer}.{head}"][0].float().sqrt()
figure = px.imshow(pattern, labels={"x": "key", "y": "query", "color": "√A"}, zmin=0, zmax=1)
figure.update_layout(title=f"L{layer}H{head}", template="plotly_white")
