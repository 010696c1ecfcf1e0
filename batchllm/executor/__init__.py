"""Runs a Plan on one model: steps over flat ragged batches, shared-prefix KV, sampling."""

import logging

# transformers imports torchao wherever it is installed, which then warns about its GPU kernels.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
