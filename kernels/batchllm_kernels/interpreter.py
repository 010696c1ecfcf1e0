"""Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1, on CPU tensors), and what it needs.

Every module that launches kernels imports `INTERPRETED` from here. The interpreter differs from a GPU in ways that
kernels must know of (seen in Triton 3.6 to 3.9):
  - `tl.dot` of bfloat16 multiplies the raw bits, so operands are cast to float32 first;
  - float32 → bfloat16 truncates instead of rounding to nearest even;
  - programs run one after another, so races cannot be seen and waiting for another program hangs.
The variable must be set before anything imports triton: its own library is decorated when it is imported.
"""

from __future__ import annotations

import os
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _accept_new_numpy() -> None:
    """Triton 3.6's interpreter turns loop bounds into integers with int(array), which NumPy 2.4 refuses for arrays
    that hold one number but have a dimension. Later versions of Triton do not need this."""
    import numpy as np
    import triton.runtime.interpreter as interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])

    interpreter._patch_lang_tensor = patched


if INTERPRETED:
    _accept_new_numpy()
