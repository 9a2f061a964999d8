"""The direction of the residual stream that the unembedding hears least.

The final norm gives every vector one size, so what lies along this direction takes size from all the rest
and softens the distribution without preferring a token. Models use it to be less sure.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from interp.models.model import Model


@torch.no_grad()
def quiet_direction(
    model: Model, towards: Float[Tensor, " d_model"] | None = None
) -> Float[Tensor, " d_model"]:
    """The unit vector along which logits differ least between tokens, the final norm's gain included.

    The eigenvector of the smallest eigenvalue of D W Wᵀ D, with D the gain and W the unembedding less its
    mean over the vocabulary, which a softmax does not see; orthogonal to 1 where the norm takes the mean
    out, as that leaves nothing of 1.

    Args:
        towards: its sign is such that the product with this is not negative.

    Returns: [d_model], float32, on the CPU.

    Raises:
        Refused: no linear unembedding.

    Source: Stolfo et al. 2024, "Confidence Regulation Neurons in Language Models", arXiv 2406.16254;
    Cancedda 2024, arXiv 2402.09221, for the spectrum's dark end.

    >>> model = tiny_model()
    >>> v = quiet_direction(model)
    >>> logits = [model.unembed(x[None]).std() for x in (v, torch.randn(32))]
    >>> bool(logits[0] < logits[1])
    True
    """
    W, norm = model.W_U, model.final_norm
    mean = W.float().mean(1)
    gram = torch.zeros(len(W), len(W), dtype=torch.float64)
    for part in W.split(2**14, dim=1):  # a 16-bit matrix is widened piece by piece
        part = part.float() - mean[:, None]
        gram += (part @ part.T).cpu().double()
    gain = norm.gain.cpu().double()
    gram *= gain[:, None] * gain
    if norm.centred:
        along = torch.full_like(gram, 1 / len(gain))  # projects onto 1
        across = torch.eye(len(gain), dtype=gram.dtype) - along
        gram = across @ gram @ across
        gram += 2 * gram.trace() * along  # 1 itself is not what is looked for
    v = torch.linalg.eigh((gram + gram.T) / 2).eigenvectors[:, 0].float()
    flip = towards is not None and float(towards.float().cpu() @ v) < 0
    return -v if flip else v
