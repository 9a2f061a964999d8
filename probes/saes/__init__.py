"""Sparse autoencoders: trained on stored activations, judged, spliced, and read from the field's files.

>>> import tempfile, probes
>>> from interp.data.activations import collect_activations
>>> text = [torch.randint(97, (60,), generator=torch.Generator().manual_seed(i)) for i in range(12)]
>>> model = tiny_model()
>>> data = collect_activations(model, text, tempfile.mkdtemp(), site="z.1", tokens=400, context=32)
>>> sae, report = probes.train_sae(data, d_sae=64, k=4, batch_size=100, progress=False)
>>> sae
SAE(32 → 64, topk, k=4, site=z.1)
>>> run = model.run(text[0][None, :32], edits=[probes.splice(sae, model)])
"""
