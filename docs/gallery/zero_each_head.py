"""What each head is worth to a prediction.

Every head's z set to zero, one at a time, and the logit of the next word read again: many heads in one
forward, each from its own layer on. No analysis of the package is used, only its window.
"""

import numpy as np
import plotly.express as px

import interp

model = interp.load()
word = model.token_id(" France")
clean = model.run("The capital of France is Paris. Paris is in", capture=["resid_pre"])
heads = list(np.ndindex(model.n_layers, model.spec.n_heads))
change = model.replay(
    clean,
    [[interp.Edit.zero("z", heads=[head])] for head in heads],
    lambda run: float(run.logits[0, -1, word] - clean.logits[0, -1, word]),
)
table = np.reshape(change, (model.n_layers, -1))
figure = px.imshow(table, aspect="auto", color_continuous_scale="RdBu_r")
figure.update_layout(xaxis_title="head", yaxis_title="layer", coloraxis_cmid=0)
