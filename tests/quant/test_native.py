"""The compiled kernels against PyTorch's operators: the same bits forward, the same sums backward, and what happens without them."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geta.quant import native, native_build, native_status, ops
from geta.quant.native_build import NativeStatus

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
HAS_COMPILER = native_status().used
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1e-310, 1e-39, -1e-39, 3e38, -6e4, 0.5, 1.5, 2.5, 65504.0]
PARAMETERS = st.sampled_from([0.0, -1.0, 1e-30, 1e-7, 0.25, 1.0, 4.0, 1e3, 1e30, math.inf, math.nan]) | st.floats(1e-3, 4.0)


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns, with one pattern for every NaN."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return torch.where(tensor.isnan(), -1, tensor.contiguous().view(kind))


def aten_values(x: Tensor, d: Tensor, q_m: Tensor, signed: bool) -> Tensor:
    return ops.aten_values(x, ops.prepared(x, d, q_m, torch.ones_like(d), True), signed, True)


def native_values(x: Tensor, d: Tensor, q_m: Tensor, signed: bool) -> Tensor:
    values = native.quantize(x, d, q_m, torch.ones_like(d), signed=signed)
    assert values is not None
    return values


def native_gradients(grad: Tensor, x: Tensor, d: Tensor, q_m: Tensor, signed: bool, a: tuple[float, ...] = ()) -> tuple[Tensor, ...]:
    found = native.gradients(grad, x, d, q_m, torch.ones_like(d), amplitudes=a, strength=None, signed=signed)
    assert found is not None
    return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, grad, d, q_m: per tensor or per channel, with special values and sizes around the kernels' vectors and blocks."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.sampled_from([(1,), (31,), (32,), (33,), (4097,), (3, 8), (5, 3, 17), (2, 3, 4, 5), (2, 4100)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) * draw(st.sampled_from([1e-3, 1.0, 50.0]))).to(dtype)
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=6)):
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = torch.tensor(value, dtype=torch.float64).to(dtype)
    if len(shape) == 4 and draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    grad = torch.empty_like(x).copy_(torch.randn(shape, generator=generator))
    wide = torch.float64 if dtype == torch.float64 and draw(st.booleans()) else torch.float32
    parameter_shape = [1] * len(shape)
    if draw(st.booleans()) and math.prod(shape[1:]) >= 8:
        parameter_shape[0] = shape[0]
    if len(shape) == 3 and draw(st.booleans()):
        parameter_shape = [1, shape[1], 1]
    count = math.prod(parameter_shape)
    d, q_m = (torch.tensor(draw(st.lists(PARAMETERS, min_size=count, max_size=count)), dtype=wide) for _ in range(2))
    return x, grad, d.view(parameter_shape), q_m.view(parameter_shape)


@settings(max_examples=400, derandomize=True, deadline=None)
@given(cases(), st.booleans())
def test_values_are_bitwise_those_of_the_operators(case: tuple[Tensor, Tensor, Tensor, Tensor], signed: bool) -> None:
    x, _, d, q_m = case
    values, wanted = native.quantize(x, d, q_m, torch.ones_like(d), signed=signed), aten_values(x, d, q_m, signed)
    assert (values is not None) == HAS_COMPILER
    if values is not None:
        assert values.stride() == wanted.stride()
        assert torch.equal(bits(values), bits(wanted))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(cases(), st.booleans(), st.sampled_from([(), (0.0,), (0.21,), (0.1, -0.05, 0.04, 0.01, -0.02)]))
def test_gradients_are_those_of_the_operators(
    case: tuple[Tensor, Tensor, Tensor, Tensor], signed: bool, amplitudes: tuple[float, ...]
) -> None:
    x, grad, d, q_m = case
    t = torch.ones_like(d)
    found = native.gradients(grad, x, d, q_m, t, amplitudes=amplitudes, strength=None, signed=signed)
    assert (found is not None) == HAS_COMPILER
    if found is None:
        return
    dx, *_ = ops.aten_gradients(grad, x, d, q_m, t, signed, True, amplitudes)
    if any(amplitudes):
        rough = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(x.dtype, 1e-3 if x.dtype == torch.float32 else 1e-9)
        torch.testing.assert_close(found[0], dx, rtol=rough, atol=1e-6, equal_nan=True)
    else:
        assert torch.equal(bits(found[0]), bits(dx))
    if x.dtype == torch.float64 and d.dtype == torch.float64:
        wanted = ops.aten_gradients(grad, x, d, q_m, t, signed, True, amplitudes)[1:3]
    else:  # rounded to float32 as the kernel does, then summed in float64 by the operators
        wanted = _sums_in_float64(grad, x, d, q_m, signed)
    size = float(grad.double().abs().sum()) + 1.0
    for mine, other, parameter in zip(found[1:], wanted, (d, q_m), strict=True):
        assert mine.shape == parameter.shape
        assert mine.dtype == parameter.dtype
        torch.testing.assert_close(mine.double(), other.double(), rtol=1e-5, atol=1e-6 * size, equal_nan=True)


def _sums_in_float64(grad: Tensor, x: Tensor, d: Tensor, q_m: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    p = ops.prepared(x, d, q_m, torch.ones_like(d), True)
    wide, g = x.to(dtype), grad.to(dtype)
    clipped = ops._clip(wide, p.q_m, signed=signed)
    u = clipped / p.d
    beyond = (g - g * (clipped == wide)) * clipped.sign()
    return (g * (u.round() - u)).double().sum_to_size(d.shape), beyond.double().sum_to_size(q_m.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("amplitudes", [(), (0.15, 0.03)])
def test_the_number_of_threads_does_not_change_a_bit(dtype: torch.dtype, amplitudes: tuple[float, ...]) -> None:
    x, grad = torch.randn(7, 40_001, dtype=dtype), torch.randn(7, 40_001, dtype=dtype)
    before = torch.get_num_threads()
    for shape in [(1, 1), (7, 1)]:
        d, q_m = torch.full(shape, 0.03, dtype=dtype), torch.full(shape, 1.1, dtype=dtype)
        results = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                values = native_values(x, d, q_m, True)
                results.append([values, *native_gradients(grad, x, d, q_m, True, amplitudes)])
                assert native.fingerprint(x) == native.fingerprint(x.clone())
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(bits(left), bits(right)) for left, right in zip(results[0], other, strict=True))


def test_sums_of_many_elements_are_more_exact_than_float32() -> None:
    x, grad = torch.full((3_000_000,), 0.26), torch.ones(3_000_000)
    d, q_m = torch.tensor(0.1), torch.tensor(1.0)
    _, dd, _ = native_gradients(grad, x, d, q_m, True)
    u = x[0].double() / d.double()
    assert float(dd) == pytest.approx(float(u.round() - u) * 3_000_000, rel=1e-6)


def test_strength_scales_the_amplitudes() -> None:
    x, grad = torch.randn(200), torch.randn(200)
    d, q_m, t = torch.tensor(0.3), torch.tensor(1.0), torch.tensor(1.0)
    half = native.gradients(grad, x, d, q_m, t, amplitudes=(0.2, 0.01), strength=torch.tensor(0.5), signed=True)
    assert half is not None
    assert torch.equal(half[0], native_gradients(grad, x, d, q_m, True, (0.1, 0.005))[0])
    wanted = ops.aten_gradients(grad, x, d, q_m, t, True, True, (0.2, 0.01), "fourier", torch.tensor(0.5))
    torch.testing.assert_close(half[0], wanted[0], rtol=1e-4, atol=1e-6)


def test_gradients_with_other_strides_than_x() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    d, q_m, t = torch.tensor(0.1), torch.tensor(1.0), torch.tensor(1.0)
    for grad in (torch.randn(2, 3, 4, 5), torch.ones(()).expand(2, 3, 4, 5)):
        wanted = ops.aten_gradients(grad, x, d, q_m, t, True, True, ())
        assert torch.equal(native_gradients(grad, x, d, q_m, True)[0], wanted[0])


@pytest.mark.parametrize(
    ("x", "shape"),
    [
        pytest.param(torch.randn(6, 10)[:, ::2], (1, 1), id="with gaps"),
        pytest.param(torch.randn(6, 10).t(), (10, 1), id="transposed"),
        pytest.param(torch.randn(6, 10), (1, 10), id="last dimension"),
        pytest.param(torch.randn(3, 4, 9), (3, 4, 1), id="two dimensions"),
        pytest.param(torch.randn(0, 4), (1, 1), id="empty"),
        pytest.param(torch.randn(4), (1, 1), id="more dimensions than x"),
    ],
)
def test_other_layouts_take_the_operators(x: Tensor, shape: tuple[int, ...]) -> None:
    d, q_m = torch.full(shape, 0.1), torch.full(shape, 1.0)
    assert native.quantize(x, d, q_m, q_m, signed=True) is None
    grad = torch.ones_like(x)
    assert native.gradients(grad, x, d, q_m, q_m, amplitudes=(), strength=None, signed=True) is None
    if d.dim() <= x.dim():
        values = torch.ops.geta.fake_quantize(x, d, q_m, q_m, True, True, ())
        assert torch.equal(values, aten_values(x, d, q_m, True))


def test_parameters_wider_than_x_take_the_operators() -> None:
    x, d = torch.randn(8), torch.tensor(0.1, dtype=torch.float64)
    assert native.quantize(x, d, d, d, signed=True) is None
    assert torch.ops.geta.fake_quantize(x, d, d, d, True, True, ()).dtype == torch.float32


def test_fake_tensors_take_the_operators() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, d = torch.randn(8), torch.tensor(0.1)
        assert not native.is_eager(x, d)
        assert torch.ops.geta.fake_quantize(x, d, d, d, True, True, ()).shape == (8,)


def test_fingerprints_see_every_change() -> None:
    x = torch.randn(10_000)
    first = native.fingerprint(x)
    assert first is not None
    for position in (0, 1, 31, 4095, 4096, 9_999):
        changed = x.clone()
        changed[position] = changed[position].nextafter(torch.tensor(10.0))
        assert native.fingerprint(changed) != first
    assert native.fingerprint(x.flip(0)) != first
    assert native.fingerprint(x[:9_999].clone()) != native.fingerprint(x[1:].clone())
    assert native.fingerprint(torch.tensor([0.0])) != native.fingerprint(torch.tensor([-0.0]))
    assert native.fingerprint(torch.randn(3).half()) is None


# Building and falling back. Each test starts without a loaded library, with a cache folder of its own.


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_loaded", None)
    return tmp_path / "geta"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the compiled library."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(native, "_loaded", None)
        assert native_status().used
    return folder / "geta"


@pytest.fixture
def filled(fresh: Path, built: Path) -> Path:
    """A cache folder of the test's own that already has the library."""
    shutil.copytree(built, fresh)
    return fresh


def quantizes_as_the_operators() -> bool:
    x, d, q_m = torch.randn(500), torch.tensor(0.1), torch.tensor(1.0)
    return torch.equal(torch.ops.geta.fake_quantize(x, d, q_m, q_m, True, True, ()), aten_values(x, d, q_m, True))


def test_switched_off(fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("GETA_NATIVE", "0")
    with caplog.at_level(logging.WARNING, "geta"):
        assert quantizes_as_the_operators()
    assert native_status() == NativeStatus(used=False, reason="GETA_NATIVE=0")
    assert str(native_status()) == "PyTorch's operators, because GETA_NATIVE=0"
    assert not caplog.records
    assert not fresh.exists()


@pytest.mark.parametrize(
    ("compiler", "words"),
    [("/no/such/compiler", "CC=/no/such/compiler was not found"), ("false", "failed"), ("true", "cannot be loaded")],
)
def test_without_a_working_compiler(
    compiler: str, words: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", compiler)
    with caplog.at_level(logging.INFO, "geta"):
        assert quantizes_as_the_operators()
        assert quantizes_as_the_operators()
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert words in warnings[0].getMessage()
    assert not native_status().used


def test_without_any_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert quantizes_as_the_operators()
    assert native_status().reason == "there is no C compiler (cc, gcc or clang)"


def kept_library(folder: Path) -> Path:
    (library,) = folder.glob("*.so")
    return library


def test_kept_library_is_loaded_without_a_compilation(filled: Path, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [path.suffix for path in sorted(built.iterdir())] == [".sha256", ".so"]
    assert stat.S_IMODE(built.stat().st_mode) == 0o700
    monkeypatch.setattr(native_build, "_compile", never)
    assert native_status().used
    assert native_status().library == str(kept_library(filled))


def never(*arguments: object) -> Path:
    raise AssertionError("the library was compiled again")


@pytest.mark.parametrize("damage", [b"", b"no library", None])
def test_damaged_library_is_replaced(damage: bytes | None, filled: Path) -> None:
    library = kept_library(filled)
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert native_status().used
    assert len(kept_library(filled).read_bytes()) == len(whole)


def test_library_that_others_may_write_is_replaced(filled: Path) -> None:
    kept_library(filled).chmod(0o777)
    assert native_status().used
    assert not kept_library(filled).stat().st_mode & 0o022


def test_library_of_another_version_is_not_used(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build, "ABI", 999)
    monkeypatch.setattr(native_build, "_VARIANTS", ((),))
    assert "computes wrong results" in native_status().reason
    assert quantizes_as_the_operators()


def test_read_only_cache_folder(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh.mkdir()
    monkeypatch.setattr(native_build, "_publish", no_space)  # permissions would not stop a superuser
    assert native_status().used
    assert not list(fresh.iterdir())
    assert not Path(native_status().library).exists()
    assert quantizes_as_the_operators()


def no_space(built: Path, kept: Path) -> None:
    raise OSError("read-only file system")


def test_no_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native_build.cache_folder() is None
    monkeypatch.setattr(native, "_loaded", None)
    assert native_status().used


@pytest.mark.parametrize("missing", [lambda variant: "-fopenmp" in variant, bool])
def test_compiler_without_some_flags(missing: Callable[[tuple[str, ...]], bool], fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = tuple((*v, "-no-such-flag") if missing(v) else v for v in native_build._VARIANTS)
    monkeypatch.setattr(native_build, "_VARIANTS", variants)
    assert native_status().used
    assert not native_status().threads
    x, d, q_m = torch.randn(100_000), torch.tensor(0.1), torch.tensor(1.0)
    assert torch.equal(native_values(x, d, q_m, True), aten_values(x, d, q_m, True))


PROGRAM = (
    "import geta.quant, sys; from geta.quant import native; assert native._loaded is None; sys.exit(not geta.quant.native_status().used)"
)


def test_processes_may_compile_at_once(fresh: Path) -> None:
    started = [subprocess.Popen([sys.executable, "-c", PROGRAM]) for _ in range(2)]
    assert [process.wait(timeout=600) for process in started] == [0, 0]
    assert native_build._is_intact(kept_library(fresh))
    assert sorted(path.suffix for path in fresh.iterdir()) == [".sha256", ".so"]


def test_status_in_words(filled: Path) -> None:
    assert str(native_status()).startswith(f"compiled kernels in {filled}")


def test_triton_is_not_needed() -> None:
    """Where it is installed, its kernels are compared with the operators: on CUDA devices, or in its interpreter without one."""
    if importlib.util.find_spec("triton") is None:
        assert "geta.quant.triton_kernels" not in sys.modules
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = "(torch.float32, torch.float16, torch.bfloat16)" if device == "cuda" else "(torch.float32, torch.float16)"
    program = (
        "import torch; from geta.quant import triton_kernels as kernels; "
        f"print(kernels.agrees_with_operators(torch.device({device!r}), {dtypes}))"
    )
    environment = os.environ if device == "cuda" else {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "True"
