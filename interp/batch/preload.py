"""What every worker process imports, imported once for all of them."""

import torch  # noqa: F401
import transformers.modeling_utils  # noqa: F401

import interp.batch.worker
import interp.open
import interp.report  # noqa: F401
