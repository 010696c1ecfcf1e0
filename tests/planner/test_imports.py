"""The planner works where torch is not installed, and starts without waiting for it."""

from __future__ import annotations

import subprocess
import sys


def test_the_planner_never_imports_torch():
    code = "import sys, batchllm.planner; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
