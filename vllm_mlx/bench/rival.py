"""Starts mlx-lm's server on the BLAS that ours uses: `python -m vllm_mlx.bench.rival [mlx_lm.server's arguments]`.

So that a comparison on the CPU compares servers and not libraries. Nothing of mlx-lm is changed.
"""

from __future__ import annotations

import runpy
import sys

from vllm_mlx import blas

if __name__ == "__main__":
    print(f"BLAS: {blas.load()}", file=sys.stderr, flush=True)
    sys.argv = ["mlx_lm.server", *sys.argv[1:]]
    runpy.run_module("mlx_lm.server", run_name="__main__", alter_sys=True)
