"""What the GPU path reaches on one GPU, in ten minutes: python -m benchmarks.gpu

Kernel times against measured copy bandwidth and against torch's attention; whole jobs against the least time that
their arithmetic and reads take, and against transformers' continuous batching; a profile of where the rest goes.
Models have the shapes of real ones and random weights, made on the device. Prints one table and writes JSON, after
every part, to benchmarks/results/DEVICE/. What the time does not suffice for is left out and named.

No GPU has run any of this yet. On the first one, each as soon as the one before it is well:

    TRITON_INTERPRET=0 python -m pytest tests/kernels   every kernel and the engine, compiled for the device
    python -m benchmarks.gpu.checks     eight rows past 512 tokens each: `recorded` must be 2 or more and `not_recorded`
                                        empty, else decode steps are launched kernel by kernel
    python -m benchmarks.gpu

    --dry-run   everything with a handful of tokens, on a CPU: attention in Triton's interpreter, jobs with the
                kernels' torch references
"""

from __future__ import annotations

import os
import sys

if "--dry-run" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from benchmarks.gpu.script import main

if __name__ == "__main__":
    main()
