"""The products under MLX's CPU backend: right for any shape, the same for a row whatever stands beside it."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mlx import blas

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate")
NO_TRANS, TRANS = 111, 112


@pytest.fixture(scope="module")
def shim():
    """The compiled shim. MLX in this process may be using it too, so the end restores what `load` sets."""
    library = ctypes.CDLL(str(blas.build()))
    found = blas.find_openblas()
    assert found is not None
    openblas = ctypes.CDLL(found.path)

    def configure(max_rows: int, threads: int = 1, limit: int = 2) -> int:
        return blas.attach(library, found, openblas, threads, max_rows, limit)

    library.configure = configure
    yield library
    configure(blas.MAX_ROWS, blas.default_threads())


def product(shim, a, b, *, b_trans: bool, alpha: float = 1.0, beta: float = 0.0, c=None):
    """alpha * a @ b + beta * c through cblas_sgemm; arrays may be views with a longer row stride."""
    m, k = a.shape
    n = b.shape[0] if b_trans else b.shape[1]
    c = np.full((m, n), np.nan, np.float32) if c is None else c.copy()
    pointer = ctypes.POINTER(ctypes.c_float)
    shim.cblas_sgemm(
        101, NO_TRANS, TRANS if b_trans else NO_TRANS, m, n, k, ctypes.c_float(alpha), a.ctypes.data_as(pointer),
        a.strides[0] // 4, b.ctypes.data_as(pointer), b.strides[0] // 4, ctypes.c_float(beta),
        c.ctypes.data_as(pointer), c.strides[0] // 4)
    return c


def random_matrix(seed: int, rows: int, cols: int, spare: int) -> np.ndarray:
    """`rows` by `cols` within rows that are `spare` floats longer, filled with NaN that must not be read."""
    whole = np.full((rows, cols + spare), np.nan, np.float32)
    whole[:, :cols] = np.random.default_rng(seed).standard_normal((rows, cols), dtype=np.float32)
    return whole[:, :cols]


@settings(max_examples=120, deadline=None)
@given(m=st.integers(1, 70), n=st.integers(1, 150), k=st.integers(1, 90), spare=st.integers(0, 3),
       b_trans=st.booleans(), level=st.integers(0, 2), threads=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_products_equal_numpy_s_for_any_shape_and_stride(shim, m, n, k, spare, b_trans, level, threads, seed):
    shim.configure(64, threads, level)
    a, b = random_matrix(seed, m, k, spare), random_matrix(seed + 1, *((n, k) if b_trans else (k, n)), spare)
    expected = a.astype(np.float64) @ (b.T if b_trans else b).astype(np.float64)
    np.testing.assert_allclose(product(shim, a, b, b_trans=b_trans), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("b_trans", [True, False])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_long_sums_and_many_columns_use_every_block(shim, b_trans, level):
    shim.configure(blas.ALL_ROWS, 2, level)
    a = random_matrix(1, 130, 2500, 0)
    b = random_matrix(2, *((333, 2500) if b_trans else (2500, 333)), 0)
    expected = a.astype(np.float64) @ (b.T if b_trans else b).astype(np.float64)
    np.testing.assert_allclose(product(shim, a, b, b_trans=b_trans), expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("b_trans", [True, False])
def test_alpha_and_beta_scale_and_add(shim, b_trans):
    shim.configure(64)
    a, c = random_matrix(1, 7, 40, 1), random_matrix(3, 7, 37, 0)
    b = random_matrix(2, *((37, 40) if b_trans else (40, 37)), 2)
    expected = 0.5 * a @ (b.T if b_trans else b) - 2 * c
    np.testing.assert_allclose(product(shim, a, b, b_trans=b_trans, alpha=0.5, beta=-2, c=c), expected, rtol=1e-4,
                               atol=1e-4)


@pytest.mark.parametrize("b_trans", [True, False])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_row_s_result_is_the_same_bits_in_any_company(shim, b_trans, level):
    a = random_matrix(1, 300, 1100, 0)
    b = random_matrix(2, *((75, 1100) if b_trans else (1100, 75)), 0)
    shim.configure(blas.ALL_ROWS, 1, level)
    alone = np.concatenate([product(shim, a[i:i + 1], b, b_trans=b_trans) for i in range(len(a))])
    for rows in (2, 3, 5, 64, 65, 300):
        for threads in (1, 3):
            shim.configure(blas.ALL_ROWS, threads, level)
            assert np.array_equal(product(shim, a[:rows], b, b_trans=b_trans), alone[:rows]), (rows, threads)


def test_products_of_many_rows_are_openblas_s_unless_invariance_is_asked_for(shim):
    a, b = random_matrix(1, 100, 64, 0), random_matrix(2, 48, 64, 0)
    shim.configure(blas.MAX_ROWS)
    forwarded = product(shim, a, b, b_trans=True)
    shim.configure(0)
    assert np.array_equal(forwarded, product(shim, a, b, b_trans=True))


def run_python(code: str, **environ: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False,
                            env={"PATH": "/usr/bin:/bin", **environ})
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


MLX_PRODUCT = """
import numpy as np
from vllm_mlx import blas
report = blas.load({choice!r}, 1)
import mlx.core as mx
a = np.random.default_rng(0).standard_normal((9, 300), dtype=np.float32)
b = np.random.default_rng(1).standard_normal((70, 300), dtype=np.float32)
assert np.allclose(np.array(mx.array(a) @ mx.array(b).T), a @ b.T, atol=1e-3)
print(report.library, report.kernels, "loaded" if any("gemm-" in line for line in open("/proc/self/maps")) else "not")
"""


@pytest.mark.parametrize("choice", ["auto", "numpy"])
def test_mlx_uses_what_was_loaded_before_it(choice, tmp_path):
    answer = run_python(MLX_PRODUCT.format(choice=choice), XDG_CACHE_HOME=str(blas.cache_folder().parent))
    library, kernels, loaded = answer.split(" ", 2)[0], answer.split(" ", 1)[1].rsplit(" ", 1)[0], answer.split()[-1]
    assert (library, loaded) == ("numpy", "loaded")
    assert kernels in blas.KERNELS


def test_off_leaves_mlx_alone():
    assert run_python(MLX_PRODUCT.format(choice="off")) == "none None not"


def test_loading_after_mlx_is_too_late_and_says_so():
    assert "MLX was imported before" in run_python(
        "import mlx.core\nfrom vllm_mlx import blas\nprint(blas.load())")


def test_without_a_compiler_the_report_says_what_to_install(tmp_path):
    code = "from vllm_mlx import blas\nblas.SYSTEM_NAMES = ()\nprint(blas.load())"
    answer = run_python(code, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert answer == "MLX's own BLAS (no C compiler was found; install a C compiler or libopenblas)"


def test_the_shim_is_compiled_once_and_a_library_others_could_write_is_not_trusted(tmp_path):
    code = "from vllm_mlx import blas\npath = blas.build()\nprint(path, path.stat().st_ino)"
    first = run_python(code, XDG_CACHE_HOME=str(tmp_path))
    assert run_python(code, XDG_CACHE_HOME=str(tmp_path)) == first
    path = next((tmp_path / "vllm-mlx").glob("gemm-*.so"))
    path.chmod(0o777)
    assert run_python(code, XDG_CACHE_HOME=str(tmp_path)) != first


def test_a_forked_child_computes_too():
    code = MLX_PRODUCT.format(choice="auto").replace("1)\nimport mlx", "3)\nimport mlx") + """
import os
x = mx.random.normal((8, 2048)); w = mx.random.normal((4096, 2048)); mx.eval(x, w)
import ctypes, numpy as np
shim = ctypes.CDLL(str(blas.build()))
a, b, c = np.ones((8, 2048), np.float32), np.ones((4096, 2048), np.float32), np.zeros((8, 4096), np.float32)
p = lambda v: v.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
one, zero = ctypes.c_float(1), ctypes.c_float(0)
def run(): shim.cblas_sgemm(101, 111, 112, 8, 4096, 2048, one, p(a), 2048, p(b), 2048, zero, p(c), 4096)
run()
pid = os.fork()
if pid == 0:
    c[:] = 0
    run()
    os._exit(0 if (c == 2048).all() else 1)
assert os.waitpid(pid, 0)[1] == 0
"""
    run_python(code, XDG_CACHE_HOME=str(blas.cache_folder().parent))


SOFTMAX, EXP, SWIGLU, RMS_NORM, ROPE, ARGMAX = (float.fromhex(f"0x1.fffff{digit}p127") for digit in "2468ac")


@settings(max_examples=120, deadline=None)
@given(m=st.integers(1, 9), n=st.integers(1, 100), level=st.integers(0, 2), seed=st.integers(0, 2**32 - 1))
def test_a_row_s_softmax_is_numpy_s_over_its_visible_columns(shim, m, n, level, seed):
    shim.configure(64, 1, level)
    rng = np.random.default_rng(seed)
    x = random_matrix(seed, m, n, 0) * 8
    ranges = np.sort(rng.integers(0, n + 1, (m, 2)), axis=1).astype(np.float32)
    result = product(shim, ranges, np.zeros((2, n), np.float32), b_trans=False, alpha=SOFTMAX, beta=1, c=x)
    expected = np.zeros((m, n))
    for row, (begin, end) in enumerate(ranges.astype(int).tolist()):
        if begin < end:
            powers = np.exp(x[row, begin:end].astype(np.float64) - x[row, begin:end].max())
            expected[row, begin:end] = powers / powers.sum()
    np.testing.assert_allclose(result, expected, rtol=2e-5)
    alone = product(shim, ranges[:1], np.zeros((2, n), np.float32), b_trans=False, alpha=SOFTMAX, beta=1, c=x[:1])
    assert np.array_equal(alone[0], result[0])


@pytest.mark.parametrize("level", [0, 1, 2])
def test_exponentials_are_exact_to_two_units_and_keep_what_is_no_number(shim, level):
    shim.configure(64, 1, level)
    x = np.concatenate([np.linspace(-87.2, 88.6, 4001), [0.0, -0.0, -200.0, -np.inf, 88.8, np.inf, np.nan]])
    x = x.astype(np.float32)[None]
    one, many = np.zeros((1, 1), np.float32), np.zeros((1, x.shape[1]), np.float32)
    result = product(shim, one, many, b_trans=False, alpha=EXP, beta=1, c=x)[0]
    exact = np.exp(x[0, :4001].astype(np.float64))
    assert np.max(np.abs(result[:4001] / exact - 1)) < 2.5e-7
    assert result[4001:].tolist()[:6] == [1, 1, 0, 0, np.inf, np.inf] and np.isnan(result[-1])


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("columns", [1, 3])
def test_swiglu_gates_by_the_other_matrix(shim, level, columns):
    shim.configure(64, 1, level)
    gate, up = random_matrix(1, 37, columns, 0) * 20, random_matrix(2, 37, 1, 0)
    result = product(shim, up, np.ones((1, columns), np.float32), b_trans=False, alpha=SWIGLU, beta=1, c=gate)
    expected = gate / (1 + np.exp(-gate.astype(np.float64))) * up
    if columns == 1:  # as Python asks for it
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-9)
    else:  # the first column of what lies strided
        np.testing.assert_allclose(result[:, :1], expected[:, :1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("width", [1, 16, 37, 512])
def test_rms_norm_divides_by_the_root_of_the_mean_square(shim, level, width):
    shim.configure(64, 1, level)
    x, weight = random_matrix(1, 5, width, 0) * 3, random_matrix(2, 1, width, 0)
    result = product(shim, np.zeros((5, 1), np.float32), weight, b_trans=False, alpha=RMS_NORM, beta=1e-5, c=x)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize(("half", "width"), [(1, 2), (8, 16), (32, 64), (19, 50)])
def test_rope_turns_pairs_by_exact_angles_also_far_out(shim, level, half, width):
    shim.configure(64, 1, level)
    x, positions = random_matrix(1, 6, width, 0), np.array([[0], [1], [77], [4095], [131071], [999999]], np.float32)
    frequencies = np.zeros((1, width), np.float32)
    frequencies[0, :half], frequencies[0, -1] = 1e4 ** -(np.arange(half) / half), half
    result = product(shim, positions, frequencies, b_trans=False, alpha=ROPE, beta=1, c=x)
    angles = (positions * frequencies[:, :half]).astype(np.float64)
    first, second = x[:, :half], x[:, half : 2 * half]
    np.testing.assert_allclose(result[:, :half], first * np.cos(angles) - second * np.sin(angles), atol=1e-5)
    np.testing.assert_allclose(result[:, half : 2 * half], second * np.cos(angles) + first * np.sin(angles), atol=1e-5)
    assert np.array_equal(result[:, 2 * half :], x[:, 2 * half :])


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 5), n=st.integers(1, 120), level=st.integers(0, 2), seed=st.integers(0, 2**32 - 1))
def test_argmax_is_the_first_largest_and_tells_of_broken_rows(shim, m, n, level, seed):
    shim.configure(64, 1, level)
    rng = np.random.default_rng(seed)
    x = rng.integers(-3, 3, (m, n)).astype(np.float32)  # many ties
    x[0, rng.integers(n)] = -np.inf
    expected = x.argmax(axis=1)
    if seed % 3 == 0:
        x[-1, rng.integers(n)], expected[-1] = (np.nan, np.inf)[seed % 2], -1
    result = product(shim, x, x[:1].T.copy(), b_trans=False, alpha=ARGMAX, beta=1, c=np.zeros((m, 1), np.float32))
    assert result[:, 0].astype(int).tolist() == expected.tolist()


def test_with_the_kernels_switched_off_row_operations_are_off_too(shim):
    shim.configure(0)
    x = random_matrix(1, 3, 7, 0)
    zeros = np.zeros((3, 1), np.float32), np.zeros((1, 7), np.float32)
    assert np.array_equal(product(shim, *zeros, b_trans=False, alpha=EXP, beta=1, c=x), x)
