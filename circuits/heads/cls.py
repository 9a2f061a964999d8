"""CLS heads: attention to the token that stands before everything, and what that token itself reads."""

from circuits.heads.detector import Detector, random_key, score_and_null
from circuits.heads.encoder import no_cls
from circuits.heads.prompt_sets import IMAGES, TEXT
from interp.data.images import Images
from interp.data.prompts import Prompts
from interp.models.model import Model
from interp.run.statistics import Expected, Mass


def _to_cls(model: Model, prompts: Prompts | Images) -> dict[str, Expected | Mass]:
    cls = (prompts.positions == 0).float()
    return {
        "score": Expected(cls, prompts.content),
        "null": Mass(random_key(prompts, lowest=1), prompts.content),
    }


CLS = Detector(
    name="cls",
    title="To CLS",
    letter="c",
    description="Mean of A[q, CLS] over ordinary tokens (or patches) q: the head looks at the token that the "
    "tokenizer, or the image model, puts first. It does not show whether something is read there or the head "
    "only rests there.",
    source="Clark et al. 2019, What Does BERT Look At, §3.2; Kovaleva et al. 2019, Revealing the Dark Secrets of "
    "BERT, §4.1; threshold ours",
    reads=TEXT,
    sees=IMAGES,
    null="the same rows' attention to another position drawn at random",
    threshold=0.4,
    margin=0.25,
    rank=8,
    statistics=_to_cls,
    combine=score_and_null,
    encoder_only=True,
    unfit=no_cls,
)


def _from_cls(model: Model, prompts: Prompts | Images) -> dict[str, Expected]:
    content = prompts.content
    return {
        "score": Expected(content.float(), prompts.positions == 0),
        "null": Expected(content.float(), content),
    }


CLS_READS = Detector(
    name="cls_reads",
    title="From CLS",
    letter="r",
    description="Σ A[CLS, k] over ordinary tokens (or patches) k: in this head CLS gathers from the input, and "
    "the other positions do so less (they rest on CLS, separators, registers). Which tokens it reads stands in the "
    "evidence, in the row of CLS.",
    source="after Kovaleva et al. 2019, Revealing the Dark Secrets of BERT, §4.2 (attention of [CLS] to features), "
    "and Raghu et al. 2021, Do Vision Transformers See Like CNNs, §6 (what the CLS token holds); score and threshold "
    "ours",
    reads=TEXT,
    sees=IMAGES,
    null="the same sum in the rows of the tokens (or patches) themselves",
    threshold=0.5,
    margin=0.25,
    rank=9,
    statistics=_from_cls,
    combine=score_and_null,
    encoder_only=True,
    unfit=no_cls,
)
