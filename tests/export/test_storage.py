"""Save and load: exact round trips, exact sizes, and nothing lost or half done when something is wrong."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from torch import nn

import geta
from geta.errors import CheckpointError, ConfigError
from geta.export.files import DOCUMENT, MANIFEST, TENSORS, read_folder, write_folder
from geta.export.storage import load, save
from geta.quant.ops import step_size
from nets import NETS

FILES = [MANIFEST, DOCUMENT, TENSORS]


def tiny():
    """conv, BatchNorm, ReLU, conv, mean, linear."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(6, 5)).eval(), torch.randn(2, 3, 8, 8)


def compacted(model, args, kwargs=None, bits=()):
    """Half of the groups cut out; with `bits`, weights quantized to these widths in turn and activations to 8."""
    graph = geta.analyze(model, args, kwargs)
    if bits:
        geta.quantize(model, weights=(4, 8), activations=(8, 8), calibration=[args[0]], exclude=())
        with torch.no_grad():
            for number, quantizer in enumerate(geta.quant.quantizers(model).values()):
                width = bits[number % len(bits)] if quantizer.kind == "weight" else 8
                quantizer.d.copy_(step_size(width, quantizer.q_m, quantizer.t, quantizer.signed))
    return geta.compact(model, graph, graph.random_selection(0.5, seed=0)).eval()


@pytest.fixture(scope="module")
def small():
    model, x = tiny()
    return compacted(model, (x,), bits=(4, 7, 5)), x


@pytest.fixture
def saved(small, tmp_path):
    folder = tmp_path / "model"
    small[0].save(folder)
    return folder


def contents(folder):
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


def leaves(result):
    if isinstance(result, torch.Tensor):
        return [result]
    values = result.values() if isinstance(result, dict) else result
    return [leaf for value in values for leaf in leaves(value)]


def check_round_trip(model, folder, args, kwargs):
    save(model, folder)
    loaded = load(folder)
    save(loaded, folder.with_name("again"))
    assert contents(folder) == contents(folder.with_name("again"))
    assert sorted(contents(folder)) == sorted(FILES)
    with torch.no_grad():
        for mine, theirs in zip(leaves(model(*args, **kwargs)), leaves(loaded(*args, **kwargs)), strict=True):
            assert torch.equal(mine, theirs)
    assert str(loaded.info.to_dict()) == str(model.info.to_dict())
    assert loaded.cost == model.cost
    before, after = model.tensors(), loaded.tensors()
    assert list(before) == list(after)
    for name, tensor in before.items():
        other = after[name]
        assert torch.equal(tensor, other)
        assert (tensor.dtype, type(tensor), tensor.requires_grad) == (other.dtype, type(other), other.requires_grad)


def test_round_trip_of_a_quantized_model(small, tmp_path):
    model, x = small
    check_round_trip(model, tmp_path / "model", (x,), {})
    assert load(tmp_path / "model").bits == model.bits


def test_the_training_graph_survives(small, saved):
    model, x = small
    loaded = load(saved)
    fresh = load(saved)
    assert not loaded.training
    loaded.train()
    fresh.train()
    torch.testing.assert_close(loaded(x), fresh(x), rtol=0, atol=0)
    loaded(x).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters() if parameter.requires_grad)
    assert not torch.equal(loaded.tensors()["1.running_mean"], model.tensors()["1.running_mean"])


@pytest.mark.parametrize("name", ["bert", "llama_gqa", "shufflenet_like"])
def test_round_trip_of_networks(name, tmp_path):
    model, args, kwargs = NETS[name]()
    check_round_trip(compacted(model, args, kwargs), tmp_path / "model", args, kwargs)


def test_other_dtypes_and_widths_that_can_not_be_packed(tmp_path):
    model, x = tiny()
    x = x.double()
    wide = compacted(model.double(), (x,), bits=(16, 17, 10))
    check_round_trip(wide, tmp_path / "model", (x,), {})
    widths = {name: bits for name, bits in wide.bits.items() if name.endswith("weight")}
    assert sorted(widths.values()) == [10, 16, 17]


def test_integers_take_exactly_their_bits(small, saved):
    model, _ = small
    widths = {f"{name}_codes": bits for name, bits in model.bits.items() if f"{name}_codes" in model.tensors()}
    assert sorted(widths.values()) == [4, 5, 7]
    with safetensors.safe_open(saved / TENSORS, "pt") as file:
        packed = file.get_tensor("*uint8")
        assert packed.dtype == torch.uint8
        assert packed.numel() == sum((model.tensors()[name].numel() * bits + 7) // 8 for name, bits in widths.items())


def test_the_whole_folder_is_small(tmp_path):
    """ResNet-20 with half of its groups at 4 to 8 bits: at most 12 % of the dense float32 state dict, graphs included."""
    model, args, _ = NETS["resnet20_pad"]()
    dense = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    compact = compacted(model, args, bits=(4, 5, 6, 7, 8))
    save(compact, tmp_path / "model")
    assert sum(len(content) for content in contents(tmp_path / "model").values()) <= 0.12 * dense
    assert compact.cost.weight_bytes <= 0.06 * dense


def write_two_layers(folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    graph = geta.analyze(model, (torch.randn(2, 4),))
    geta.quantize(model, weights=(4, 8), activations=None, exclude=())
    geta.compact(model, graph, graph.random_selection(0.5)).save(folder)


def test_bytes_do_not_depend_on_the_hash_seed(tmp_path):
    """This process has one hash seed (random unless the environment fixes it), the other process another one."""
    write_two_layers(tmp_path / "here")
    imports = "import sys, torch, geta\nfrom torch import nn\n"
    program = f"{imports}{inspect.getsource(write_two_layers)}\nwrite_two_layers(sys.argv[1])"
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(geta.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "there")], env=environment, check=True)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


# Damage


@pytest.mark.parametrize("name", FILES)
def test_any_changed_byte_is_noticed(saved, name):
    content = (saved / name).read_bytes()
    step = max(1, len(content) // 60)
    for position in [*range(0, len(content), step), len(content) - 1]:
        changed = bytearray(content)
        changed[position] ^= 1
        (saved / name).write_bytes(bytes(changed))
        with pytest.raises(CheckpointError):
            load(saved)
    (saved / name).write_bytes(content)
    load(saved)


@pytest.mark.parametrize("name", FILES)
def test_truncated_and_longer_files_are_refused(saved, name):
    content = (saved / name).read_bytes()
    for length in (0, 1, 7, len(content) // 2, len(content) - 1):
        (saved / name).write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            load(saved)
    (saved / name).write_bytes(content + b"\n")
    with pytest.raises(CheckpointError):
        load(saved)


@pytest.mark.parametrize("name", FILES)
def test_missing_files_are_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} missing"):
        load(saved)


def test_extra_files_are_named(saved):
    (saved / "model.pkl").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.pkl"):
        load(saved)


@pytest.mark.parametrize("name", FILES)
def test_links_are_not_followed(saved, tmp_path, name):
    (saved / name).rename(tmp_path / name)
    (saved / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match="not an ordinary file"):
        load(saved)


def test_what_is_no_folder_is_refused(saved, tmp_path):
    with pytest.raises(CheckpointError, match="no folder"):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="can't be read as a folder"):
        load(saved / MANIFEST)
    (saved / TENSORS).unlink()
    (saved / TENSORS).mkdir()
    with pytest.raises(CheckpointError, match="not an ordinary file"):
        load(saved)


def resealed(saved, change):
    """Change the manifest and make its own checksum right again."""
    data = json.loads((saved / MANIFEST).read_bytes())
    data.pop("sha256")
    change(data)
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    (saved / MANIFEST).write_bytes((json.dumps({**data, "sha256": digest}, indent=1) + "\n").encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(version=3), "format version 3, .* reads up to version 2"),
        (lambda data: data.update(version=None), "format version None"),
        (lambda data: data.update(format="other"), "not a compact model"),
        (lambda data: data["files"].update({"../secret": {"bytes": 1, "sha256": ""}}), "altered"),
        (lambda data: data["files"].pop(TENSORS), "altered"),
        (lambda data: data["files"][TENSORS].update(bytes=5), "truncated or altered"),
        (lambda data: data["files"][TENSORS].pop("sha256"), "altered"),
        (lambda data: data["files"][DOCUMENT].update(unpacked_bytes=10), "decompressed"),
        (lambda data: data["files"][DOCUMENT].update(unpacked_bytes=1 << 60), "decompressed"),
        (lambda data: data["files"][DOCUMENT].update(unpacked_bytes="many"), "decompressed"),
    ],
)
def test_other_manifests_are_refused(saved, change, message):
    resealed(saved, lambda data: None)
    load(saved)
    resealed(saved, change)
    with pytest.raises(CheckpointError, match=message):
        load(saved)


def test_a_huge_manifest_is_not_read(saved):
    (saved / MANIFEST).write_bytes(b" " * (1 << 17))
    with pytest.raises(CheckpointError, match="more than a manifest"):
        load(saved)


def test_a_manifest_that_nests_too_deep_is_refused(saved):
    (saved / MANIFEST).write_bytes(b"[" * 60_000)
    with pytest.raises(CheckpointError):
        load(saved)


def first_call(data, target):
    return next(node for node in data["programs"]["eval"]["nodes"] if node[:2] == ["call", target])


FORGERIES = {
    "no train program under that name": lambda data: data["programs"].update(test=data["programs"].pop("train")),
    "no programs": lambda data: data["programs"].clear(),
    "programs are a list": lambda data: data.update(programs=[]),
    "another section": lambda data: data.update(code="print()"),
    "an operator from outside": lambda data: first_call(data, "aten.linear.default").__setitem__(1, "os.system"),
    "an operator that reads files": lambda data: first_call(data, "aten.linear.default").__setitem__(1, "aten.from_file.default"),
    "a tensor that was not saved": lambda data: data["programs"]["eval"]["nodes"].insert(0, ["get_attr", "nothing"]),
    "another number of inputs": lambda data: data["programs"]["eval"]["nodes"].insert(0, ["placeholder", "more", None]),
    "an input called like a statement": lambda data: data["programs"]["eval"]["nodes"][0].__setitem__(1, "x; import os"),
    "inputs that are no structure": lambda data: data["programs"]["eval"].update(inputs="[[["),
    "inputs that are no text": lambda data: data["programs"]["eval"].update(inputs=["tuple"]),
    "outputs that are no structure": lambda data: data["programs"]["eval"].update(outputs='["call", []]'),
    "no nodes": lambda data: data["programs"]["eval"].pop("nodes"),
    "a tensor that is described but not saved": lambda data: data["tensors"].update(more=data["tensors"]["1.weight"]),
    "a tensor that is saved but not described": lambda data: data["tensors"].pop("1.num_batches_tracked", data["tensors"].pop("1.bias")),
    "another shape": lambda data: data["tensors"]["1.weight"].update(shape=[1]),
    "a negative shape": lambda data: data["tensors"]["1.weight"].update(shape=[-1]),
    "another dtype": lambda data: data["tensors"]["1.weight"].update(dtype="float64"),
    "an unknown dtype": lambda data: data["tensors"]["1.weight"].update(dtype="object"),
    "other bits": lambda data: data["tensors"]["0.weight_codes"].update(bits=9),
    "impossible bits": lambda data: data["tensors"]["0.weight_codes"].update(bits=64),
    "no sign": lambda data: data["tensors"]["0.weight_codes"].pop("signed"),
    "trainable codes": lambda data: data["tensors"]["0.weight_codes"].update(trainable=True),
    "packed floats": lambda data: data["tensors"]["1.weight"].update(bits=4, signed=True),
    "a description that is none": lambda data: data["tensors"].update({"1.weight": 3}),
    "a strange name": lambda data: data["tensors"].update({"a'b": data["tensors"]["1.weight"]}),
    "info of a wrong type": lambda data: data["info"].update(bits={"0.weight": "4"}),
    "missing info": lambda data: data["info"].pop("notes"),
    "unknown info": lambda data: data["info"].update(more=1),
    "no info": lambda data: data.update(info=None),
    "costs that are none": lambda data: data["info"].update(dense_cost={"macs": 1}),
    "kept that is none": lambda data: data["info"].update(kept={"a": [True]}),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_consistent_forgeries_are_refused(saved, name):
    document, tensors = read_folder(saved)
    data = json.loads(document)
    FORGERIES[name](data)
    write_folder(saved, json.dumps(data).encode(), tensors)
    with pytest.raises(CheckpointError):
        load(saved)


@pytest.mark.parametrize("document", [b"", b"{", b"[]", b'{"programs": NaN}', b"[" * 100_000, b"\xff\xfe"])
def test_documents_that_are_none_are_refused(saved, document):
    _, tensors = read_folder(saved)
    write_folder(saved, document, tensors)
    with pytest.raises(CheckpointError):
        load(saved)


@pytest.mark.parametrize(
    "tensors",
    [
        b"",
        b"\x00" * 8,
        (1 << 40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        b"\x80\x04\x95",
    ],
)
def test_tensors_that_are_none_are_refused(saved, tensors):
    document, _ = read_folder(saved)
    write_folder(saved, document, tensors)
    with pytest.raises(CheckpointError):
        load(saved)


def test_a_forged_tensor_file_is_refused(saved):
    document, tensors = read_folder(saved)
    loaded = safetensors.torch.load(tensors)
    for end in (slice(None, -1), [0, *range(len(loaded["*uint8"]))]):
        write_folder(saved, document, safetensors.torch.save({**loaded, "*uint8": loaded["*uint8"][end].clone()}))
        with pytest.raises(CheckpointError, match=r"described but not saved|not those that the saved model describes"):
            load(saved)


# Writing


def test_saving_replaces_a_model_and_makes_parents(small, tmp_path):
    model, x = small
    other = compacted(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval(), (torch.randn(2, 4),))
    folder = tmp_path / "a" / "b"
    save(other, folder)
    save(model, folder)
    assert torch.equal(load(folder)(x), model(x))
    assert os.listdir(folder.parent) == ["b"]


@pytest.mark.parametrize("moment", range(2))
def test_a_failing_save_loses_nothing(small, saved, monkeypatch, moment):
    """Fail at the first and at the second rename, with a model already there."""
    before = contents(saved)
    calls = []
    real = os.replace

    def failing(source, target):
        calls.append(source)
        if len(calls) == moment + 1:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(ConfigError, match="No space left on device; nothing there was changed"):
        save(small[0], saved)
    assert contents(saved) == before
    assert os.listdir(saved.parent) == ["model"]


def test_a_failing_write_loses_nothing(small, saved, monkeypatch):
    before = contents(saved)

    def failing(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(ConfigError, match="Input/output error"):
        save(small[0], saved)
    assert contents(saved) == before
    assert os.listdir(saved.parent) == ["model"]


def test_a_killed_save_leaves_the_old_model_findable(saved):
    saved.rename(saved.with_name(".model.replaced-0000"))
    with pytest.raises(CheckpointError, match=r"interrupted, the model from before it is in '.*\.model\.replaced-0000'"):
        load(saved)
    load(saved.with_name(".model.replaced-0000"))


def test_folders_that_hold_something_else_are_left_alone(small, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.txt"):
        save(small[0], tmp_path)
    with pytest.raises(ConfigError, match="it is a file"):
        save(small[0], tmp_path / "thesis.txt")
    with pytest.raises(ConfigError, match=r"thesis\.txt' is a file"):
        save(small[0], tmp_path / "thesis.txt" / "model")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_only_compact_models_are_saved(tmp_path):
    with pytest.raises(CheckpointError, match="got Linear"):
        save(nn.Linear(2, 2), tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_tied_weights_stay_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.table(ids)))

    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    compact = compacted(Tied().eval(), (ids,))
    check_round_trip(compact, tmp_path / "model", (ids,), {})
    assert sum(parameter.numel() for parameter in load(tmp_path / "model").parameters()) == 10 * compact.tensors()["table.weight"].shape[1]


def test_tensors_without_values_are_not_saved(saved, tmp_path):
    with pytest.raises(CheckpointError, match="meta device"):
        save(load(saved).to("meta"), tmp_path / "other")
    assert os.listdir(tmp_path) == ["model"]
