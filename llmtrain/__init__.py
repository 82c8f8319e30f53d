"""llmtrain: one composed config takes a language model from raw documents to a served endpoint."""

import logging

__version__ = "0.1.0"

for name in ("torchao", "torch.utils._pytree"):
    # transformers imports torchao wherever it is installed, which then warns of CUDA libraries that do not load
    logging.getLogger(name).setLevel(logging.ERROR)
