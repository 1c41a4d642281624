"""TARGET of `geta analyze`: factories of the user's own, timm names, transformers configurations, and what is said about bad ones."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from geta.cli.analyze import parse_shape
from geta.cli.targets import Target, resized, resolve_target
from geta.errors import BadModelError, ConfigError

FACTORIES = """
import torch
from torch import nn

def model(): return nn.Linear(3, 2)
def with_args(): return nn.Linear(3, 2), (torch.zeros(5, 3),)
def with_kwargs(): return nn.Linear(3, 2), (), {"input": torch.zeros(7, 3)}
def four(): return nn.Linear(3, 2), (), {}, 1
def number(): return 3
not_callable = 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    yield "my_factories"
    sys.modules.pop("my_factories", None)


def test_a_model_alone_takes_the_input_shape(factories):
    found = resolve_target(f"{factories}:model", (4, 3))
    assert found.model(*found.args, **found.kwargs).shape == (4, 2)


@pytest.mark.parametrize(("name", "rows"), [("with_args", 5), ("with_kwargs", 7)])
def test_a_factory_may_bring_its_inputs(factories, name, rows):
    found = resolve_target(f"{factories}:{name}")
    assert found.model(*found.args, **found.kwargs).shape == (rows, 2)


def test_the_search_path_is_left_as_it_was(factories):
    before = list(sys.path)
    resolve_target(f"{factories}:with_args")
    assert sys.path == before


@pytest.mark.parametrize(
    ("target", "shape", "error", "words"),
    [
        ("resnet18", None, ConfigError, "has no ':'"),
        ("no_such_module:f", None, ConfigError, "no_such_module.*can't be imported"),
        ("my_factories:missing", None, ConfigError, "no function or class 'missing'"),
        ("my_factories:not_callable", None, ConfigError, "no function or class 'not_callable'"),
        ("my_factories:model", None, ConfigError, "add --input-shape"),
        ("my_factories:with_args", (1, 3), ConfigError, "brings its own inputs"),
        ("my_factories:number", (1, 3), BadModelError, "an object of type int"),
        ("my_factories:four", None, BadModelError, r"a tuple \(Linear, tuple, dict, int\)"),
        ("hf:bert", (1, 3), ConfigError, "--input-shape has no effect"),
        ("hf:", None, ConfigError, "has no ':'"),
        ("hf:./no/such/folder", None, ConfigError, "there is no file or folder './no/such/folder'"),
        ("hf:wav2vec2", None, ConfigError, "main input is 'input_values'"),
    ],
)
def test_a_bad_target_is_explained(factories, target, shape, error, words):
    with pytest.raises(error, match=words):
        resolve_target(target, shape)


def test_a_configuration_file_becomes_a_model_without_weights(tmp_path):
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    config.save_pretrained(tmp_path)
    found = resolve_target(f"hf:{tmp_path}")
    assert type(found.model).__name__ == "BertModel"
    assert {parameter.device.type for parameter in found.model.parameters()} == {"meta"}
    assert list(found.kwargs) == ["input_ids"]
    assert found.model(**found.kwargs).last_hidden_state.shape == (2, 16, 32)


def test_a_configuration_that_names_its_class_becomes_that_class(tmp_path):
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
    transformers.LlamaConfig(**settings, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "a")
    transformers.LlamaConfig(**settings, architectures=["NoSuchClass"]).save_pretrained(tmp_path / "b")
    assert type(resolve_target(f"hf:{tmp_path / 'a'}").model).__name__ == "LlamaForCausalLM"
    assert type(resolve_target(f"hf:{tmp_path / 'b'}").model).__name__ == "LlamaModel"


def test_inputs_of_another_size_repeat_the_first():
    ids, mask, image = torch.arange(6).view(2, 3), torch.tensor(True), torch.rand(2, 3, 4)
    found = resized(Target(nn.Identity(), (ids,), {"mask": mask, "image": image}), 5, 4)
    assert torch.equal(found.args[0], torch.zeros(5, 4, dtype=torch.int64))
    assert torch.equal(found.kwargs["image"], image[:1].expand(5, 3, 4))
    assert found.kwargs["mask"] is mask
    same = resized(Target(nn.Identity(), (ids,)), None, None)
    assert torch.equal(same.args[0], ids)
    with pytest.raises(ConfigError, match="--sequence has no effect"):
        resized(Target(nn.Identity(), (image,)), None, 7)


def test_image_and_encoder_decoder_configurations_get_their_inputs(tmp_path):
    transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32).save_pretrained(
        tmp_path / "vit"
    )
    transformers.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=50).save_pretrained(tmp_path / "t5")
    vit, t5 = resolve_target(f"hf:{tmp_path / 'vit'}"), resolve_target(f"hf:{tmp_path / 't5'}")
    assert {name: tuple(x.shape) for name, x in vit.kwargs.items()} == {"pixel_values": (2, 3, 32, 32)}
    assert {name: tuple(x.shape) for name, x in t5.kwargs.items()} == {"input_ids": (2, 16), "decoder_input_ids": (2, 16)}


class FakeTimmModel(nn.Conv2d):
    default_cfg = {"input_size": (3, 20, 24)}  # noqa: RUF012


@pytest.fixture
def fake_timm(monkeypatch):
    module = SimpleNamespace(
        is_model=lambda name: name == "tiny",
        create_model=lambda name, pretrained: FakeTimmModel(3, 2, 1),
        list_models=lambda: ["large", "tiny"],
    )
    monkeypatch.setitem(sys.modules, "timm", module)


@pytest.mark.usefixtures("fake_timm")
@pytest.mark.parametrize(("shape", "expected"), [(None, (2, 3, 20, 24)), ((1, 3, 8, 8), (1, 3, 8, 8))])
def test_timm_models_bring_their_input_size(shape, expected):
    assert tuple(resolve_target("timm:tiny", shape).args[0].shape) == expected


@pytest.mark.usefixtures("fake_timm")
def test_an_unknown_timm_name_is_explained():
    with pytest.raises(ConfigError, match=r"timm knows no model of that name.*; did you mean 'tiny'\?"):
        resolve_target("timm:tyny")


@pytest.mark.parametrize(("target", "module"), [("timm:resnet18", "timm"), ("hf:bert", "transformers")])
def test_a_missing_package_is_explained(monkeypatch, target, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"can't be imported here .*pip install"):
        resolve_target(target)


def test_shapes():
    assert parse_shape("1,3,224,224") == parse_shape("1x3x224x224") == (1, 3, 224, 224)
    for bad in ("", "1,,3", "a", "1,0", "-1,3"):
        with pytest.raises(ConfigError, match="--input-shape"):
            parse_shape(bad)


def test_the_random_input_is_the_same_each_time(factories):
    first, second = (resolve_target(f"{factories}:model", (4, 3)).args[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_factory_that_fails_is_named():
    with pytest.raises(BadModelError, match=r"calling Linear\(\) failed with TypeError"):
        resolve_target("torch.nn:Linear", (1, 3))
