"""Starts another project's server on the BLAS that ours uses: `python -I rival.py BLAS MODULE [its arguments]`.

So that a comparison on the CPU compares servers and not libraries; nothing of the rival is changed. BLAS is `openblas`
(the library alone) or `ours` (with our few-row kernels). A script, run by the rival's own interpreter, which does not
have this package (and may have another one of the same name): hence `blas.py`, standard library only, by its path.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType


def load_blas() -> ModuleType:
    """Our `blas.py`, under a name that collides with nothing."""
    path = Path(__file__).resolve().parents[1] / "blas.py"
    spec = importlib.util.spec_from_file_location("_bench_blas", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    kind, module_name, *arguments = sys.argv[1:]
    report = load_blas().load(few_row_kernels=kind == "ours")
    print(f"BLAS: {report}", file=sys.stderr, flush=True)
    if report.library == "none":
        sys.exit("No OpenBLAS could be put under the rival, so it would be measured on another one than ours.")
    sys.argv = [module_name, *arguments]
    runpy.run_module(module_name, run_name="__main__", alter_sys=True)
