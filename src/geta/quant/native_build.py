"""Compile `native_source.c` and `native_rows.c` with the system's C compiler, once per user and kind of processor, and load it.

The library is made when the first quantized tensor needs it, never on import, and kept in `$XDG_CACHE_HOME/geta` (`~/.cache/geta`)
under a name that is a hash of its source, the flags, the compiler's version and the processor's features; another processor on a
shared home directory gets a file of its own. Two processes may compile at once: each moves a finished file into place. Where the
folder cannot be written, the library lives in a temporary folder until it is loaded.

OpenMP is compiled in but not linked: its symbols are those of the runtime that PyTorch has loaded, so that both share one pool of
threads. Where that fails the library is single-threaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.resources
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ABI = 1
SOURCES = ("native_source.c", "native_rows.c")
SWITCH = "GETA_NATIVE"
_FLAGS = ("-std=c11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC")
_VARIANTS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
_PROCESSOR_FIELDS = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
_COMPILE_SECONDS = 300

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_FORWARD = [_POINTER] * 4 + [_LONG] * 3 + [_INT] * 2
_BACKWARD = [_POINTER] * 8 + [_LONG] * 3 + [_POINTER] + [_INT] * 3


@dataclass(frozen=True)
class NativeStatus:
    """Which kernels quantize tensors on the CPU.

    used:    whether the compiled library is used; otherwise PyTorch's own operators are, with the same results.
    reason:  why not; empty when it is used.
    library: where the library was loaded from.
    command: how it was compiled.
    threads: whether it uses as many threads as PyTorch; otherwise one.
    """

    used: bool
    reason: str = ""
    library: str = ""
    command: str = ""
    threads: bool = False

    def __str__(self) -> str:
        if not self.used:
            return f"PyTorch's operators, because {self.reason}"
        return f"compiled kernels in {self.library} ({'threads as PyTorch' if self.threads else 'one thread'}; {self.command})"


class NativeUnavailableError(Exception):
    """Why there is no library; never leaves this package."""


def build_and_load() -> tuple[ctypes.CDLL | None, NativeStatus]:
    """The library and its status, or None and the reason, which is logged once by whoever asks first."""
    logger = logging.getLogger("geta")
    if os.environ.get(SWITCH, "1") == "0":
        status = NativeStatus(used=False, reason=f"{SWITCH}=0")
        logger.info("fake quantization uses %s", status)
        return None, status
    try:
        library, status = _first_that_works()
    except NativeUnavailableError as error:
        status = NativeStatus(used=False, reason=str(error))
        logger.warning("fake quantization uses %s; it is slower, the results are the same", status)
        return None, status
    logger.info("fake quantization uses %s", status)
    return library, status


def _first_that_works() -> tuple[ctypes.CDLL, NativeStatus]:
    if os.name != "posix":
        raise NativeUnavailableError(f"the compiled kernels are not supported on {platform.system()}")
    compiler = _compiler()
    sources = {name: importlib.resources.files("geta.quant").joinpath(name).read_text(encoding="utf-8") for name in SOURCES}
    key = "\n".join(
        (*sources.values(), " ".join(compiler), _output([*compiler, "--version"]), platform.machine(), platform.system(), _processor())
    )
    reasons = []
    for variant in _VARIANTS:
        command = [*compiler, *_FLAGS, *variant]
        name = hashlib.sha256(f"{key}\n{' '.join(command)}".encode()).hexdigest()[:32]
        try:
            library, path = _load_or_build(command, sources, f"quantizer-{name}.so")
        except NativeUnavailableError as error:
            reasons.append(str(error))
            continue
        threads = bool(library.geta_has_threads())
        return library, NativeStatus(used=True, library=str(path), command=" ".join(command), threads=threads)
    raise NativeUnavailableError(reasons[-1])


def _compiler() -> list[str]:
    """The words of $CC, or the first of the usual names that exists."""
    wanted = shlex.split(os.environ.get("CC", ""))
    for candidate in [wanted] if wanted else [["cc"], ["gcc"], ["clang"]]:
        found = shutil.which(candidate[0])
        if found:
            return [found, *candidate[1:]]
    raise NativeUnavailableError(f"the compiler CC={wanted[0]} was not found" if wanted else "there is no C compiler (cc, gcc or clang)")


def _processor() -> str:
    """What `-march=native` may depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    first: dict[str, str] = {}
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        field, _, value = line.partition(":")
        if field.strip() in _PROCESSOR_FIELDS:
            first.setdefault(field.strip(), value.strip())
    return repr(sorted(first.items()))


def cache_folder() -> Path | None:
    """Where compiled libraries are kept; None when there is no such folder for this user."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = (Path(configured) if os.path.isabs(configured) else Path.home() / ".cache") / "geta"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder


def _load_or_build(command: list[str], sources: Mapping[str, str], name: str) -> tuple[ctypes.CDLL, Path]:
    folder = cache_folder()
    if folder is not None:
        kept = folder / name
        if _is_intact(kept):
            return _load(kept), kept
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as build:
                _publish(_compile(command, sources, Path(build)), kept)
            return _load(kept), kept
        except OSError as error:
            logging.getLogger("geta").info("cannot keep compiled kernels in %s: %s", folder, error)
    try:
        with tempfile.TemporaryDirectory(prefix="geta-") as build:
            built = _compile(command, sources, Path(build))
            return _load(built), built
    except OSError as error:
        raise NativeUnavailableError(f"no folder can be written to compile in ({error})") from error


def _compile(command: list[str], sources: Mapping[str, str], build: Path) -> Path:
    """Linked separately, because the linker must not link OpenMP."""
    objects = []
    for name, source in sources.items():
        (build / name).write_text(source, encoding="utf-8")
        objects.append(str(build / f"{name}.o"))
        _output([*command, "-c", str(build / name), "-o", objects[-1]])
    linker = [word for word in command if word != "-fopenmp"]
    undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
    _output([*linker, "-shared", *undefined, *objects, "-o", str(build / "kernels.so"), "-lm"])
    return build / "kernels.so"


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(  # noqa: S603 - the user's own compiler
            command, capture_output=True, text=True, errors="replace", timeout=_COMPILE_SECONDS, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailableError(f"'{command[0]}' cannot be run ({error})") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise NativeUnavailableError(f"'{command[0]}' failed: {lines[0]}")
    return done.stdout


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _publish(built: Path, kept: Path) -> None:
    """Move library and digest into place; should another process do so in between, the pair differs and is built anew next time."""
    digest = built.with_suffix(".sha256")
    digest.write_text(hashlib.sha256(built.read_bytes()).hexdigest(), encoding="ascii")
    os.replace(built, kept)
    os.replace(digest, _digest_file(kept))


def _is_intact(library: Path) -> bool:
    """Whether the file is the user's own and complete: loading half a library may kill the process."""
    try:
        status = library.stat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            return False
        return hashlib.sha256(library.read_bytes()).hexdigest() == _digest_file(library).read_text(encoding="ascii")
    except OSError:
        return False


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailableError(f"the compiled library cannot be loaded ({error})") from error
    for name, arguments, result in _signatures():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    if library.geta_abi() != ABI or not (_knows_answer(library, "f32") and _knows_answer(library, "f64")):
        raise NativeUnavailableError(f"the compiled library {path} computes wrong results")
    return library


def _signatures() -> list[tuple[str, Sequence[type], type | None]]:
    kernels: list[tuple[str, Sequence[type], type | None]] = [
        ("geta_abi", [], _INT),
        ("geta_has_threads", [], _INT),
        ("geta_blocks", [_LONG] * 3, _LONG),
        ("geta_hash", [_POINTER, _LONG, _POINTER, _INT], ctypes.c_uint64),
        ("geta_rows_zero", [_POINTER] * 2, None),
        ("geta_gather", [_POINTER, _POINTER, _LONG, _INT], None),
        ("geta_scatter", [_POINTER, _POINTER, _LONG, _INT], None),
    ]
    for kind in ("f32", "f64"):
        kernels += [(f"geta_forward_{kind}", _FORWARD, None), (f"geta_backward_{kind}", _BACKWARD, None)]
        kernels += [(f"geta_rows_{what}_{kind}", [_POINTER] * count, None) for what, count in (("copy", 3), ("sums", 8), ("move", 8))]
        kernels.append((f"geta_rows_scale_{kind}", [_POINTER, _POINTER, ctypes.c_double], None))
        kernels.append((f"geta_constrain_{kind}", [*[_POINTER] * 5, _LONG, *[ctypes.c_double] * 3], None))
    return kernels


def _knows_answer(library: ctypes.CDLL, kind: str) -> bool:
    """A tiny forward and backward pass with d = 1/4 and q_m = 1, whose results are exact."""
    real: type[ctypes.c_float | ctypes.c_double] = ctypes.c_float if kind == "f32" else ctypes.c_double
    x = (real * 6)(-2.0, -0.375, -0.1, 0.3125, 0.625, 1.5)
    grad = (real * 6)(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    out, dx, dd, dq_m = (real * 6)(), (real * 6)(), (real * 1)(), (real * 1)()
    d, q_m, partial = (real * 1)(0.25), (real * 1)(1.0), (ctypes.c_double * 2)()
    getattr(library, f"geta_forward_{kind}")(x, d, q_m, out, 1, 1, 6, 1, 1)
    getattr(library, f"geta_backward_{kind}")(grad, x, d, q_m, dx, dd, dq_m, partial, 1, 1, 6, None, 0, 1, 1)
    values = list(out) == [-1.0, -0.5, 0.0, 0.25, 0.5, 1.0]
    expected_dd = 2.0 * -0.5 + 3.0 * 0.4 + 4.0 * -0.25 + 5.0 * -0.5
    return values and list(dx) == [0.0, 2.0, 3.0, 4.0, 5.0, 0.0] and abs(dd[0] - expected_dd) < 1e-5 and dq_m[0] == 5.0
