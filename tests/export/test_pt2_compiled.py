"""`.pt2` files of machine code: compiled by AOTInductor where there is a C++ compiler, a clear error where there is none."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from torch._inductor import config

import geta
from export_nets import CASES, compacted, inputs

_ALONE = """
import sys, torch
run = torch._inductor.aoti_load_package(sys.argv[1] + "/model.pt2")
for batch, x in enumerate(torch.load(sys.argv[1] + "/x.pt")):
    torch.save(run(x), f"{sys.argv[1]}/y{batch}.pt")
assert "geta" not in sys.modules
"""
_HAS_COMPILER = any(shutil.which(name) for name in config.cpp.cxx if name)


def test_machine_code_makes_the_same_numbers_without_this_library(tmp_path, monkeypatch):
    monkeypatch.setattr(config.aot_inductor, "compile_wrapper_opt_level", "O0")  # half the time
    model = compacted("perceptron")
    path = tmp_path / "model.pt2"
    if not _HAS_COMPILER:
        with pytest.raises(geta.ConfigError, match="needs a C\\+\\+ compiler"):
            model.export_pt2(path, compiled=True)
        assert not path.exists()
        return
    size = model.export_pt2(path, compiled=True)
    assert size == path.stat().st_size > 10_000
    given = [inputs(CASES["perceptron"], batch) for batch in (5, 3)]
    torch.save(given, tmp_path / "x.pt")
    subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", _ALONE, str(tmp_path)], check=True)
    for batch, x in enumerate(given):
        with torch.no_grad():
            expected = model(x)
        (found,) = torch.load(tmp_path / f"y{batch}.pt")
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_without_a_compiler_the_old_file_stays(tmp_path, monkeypatch):
    model, path = compacted("perceptron"), tmp_path / "model.pt2"
    path.write_bytes(b"old")
    monkeypatch.setattr(config.cpp, "cxx", ("/nonexistent/compiler",))
    from torch._inductor import cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    with pytest.raises(geta.ConfigError, match=r"needs a C\+\+ compiler.*compiled=False needs none"):
        model.export_pt2(path, compiled=True)
    cpp_builder.cpp_compiler_search.cache_clear()
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]


def test_what_the_compiler_says_is_in_the_error(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("no such instruction\nand a long story")

    monkeypatch.setattr("geta.export.pt2._check_compiler", lambda: None)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(geta.BadModelError, match=r"AOTInductor can't compile this model: RuntimeError: no such instruction$"):
        compacted("perceptron").export_pt2(tmp_path / "model.pt2", compiled=True)
    assert [*tmp_path.iterdir()] == []
