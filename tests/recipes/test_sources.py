"""Models that recipes name, with real weights."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from geta.errors import BadModelError, CheckpointError, ConfigError
from geta.recipes.recipe import ModelSettings
from geta.recipes.sources import build_model
from recipe_nets import Tiny

CONFIG = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 11}


def settings(source: str, **more: object) -> ModelSettings:
    return ModelSettings.model_validate({"source": source, **more})


def test_factories_get_their_options_and_the_facts_they_have_parameters_for():
    model = build_model(settings("recipe_nets:Tiny", options={"channels": 3}), {"classes": 4, "channels": 1, "vocabulary": 9})
    assert model.fc.out_features == 4
    assert model.conv.in_channels == 3


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("no_such_module:f", {}, ConfigError, "can't be imported"),
        ("recipe_nets:Tinny", {}, ConfigError, "has no function or class 'Tinny'; did you mean 'Tiny'"),
        ("recipe_nets:Tiny", {"width": 3}, ConfigError, r"model\.options\.width: .* it takes classes, channels"),
        ("recipe_nets:not_a_model", {}, BadModelError, "object of type str"),
        ("recipe_nets:broken", {}, BadModelError, "RuntimeError: no such file"),
        ("timm:no_such", {}, ConfigError, "timm"),
        ("hf:./no/such/folder", {}, ConfigError, r"there is no file or folder '\./no/such/folder'"),
        ("hf:..", {}, ConfigError, "no configuration or weights"),
        ("hf:bert", {"class": "BertForNothing"}, ConfigError, "transformers has no such class"),
        ("hf:bert", {"class": "BertForQuestionAnswerin"}, ConfigError, "did you mean 'BertForQuestionAnswering'"),
    ],
)
def test_sources_that_give_no_model(source, options, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        build_model(settings(source, options=options), {})


def test_timm_gets_classes_and_channels(monkeypatch):
    made = {}

    def create_model(name: str, **arguments: object) -> nn.Module:
        made.update(arguments, name=name)
        return nn.Linear(1, 1)

    fake = types.SimpleNamespace(is_model=lambda name: name == "vit", list_models=lambda: ["vit"], create_model=create_model)
    monkeypatch.setitem(sys.modules, "timm", fake)
    build_model(settings("timm:vit", options={"img_size": 32}), {"classes": 10, "channels": 3, "vocabulary": 5})
    assert made == {"name": "vit", "num_classes": 10, "in_chans": 3, "img_size": 32}
    with pytest.raises(ConfigError, match="did you mean 'vit'"):
        build_model(settings("timm:vitt"), {})


def test_transformers_from_a_type_and_from_a_folder_with_weights(tmp_path):
    model = build_model(settings("hf:bert", options={"class": "BertForSequenceClassification", "num_labels": 3, **CONFIG}), {})
    assert model.classifier.out_features == 3
    model.save_pretrained(tmp_path)
    again = build_model(settings(f"hf:{tmp_path}"), {})
    assert type(again) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_weights_are_those_of_this_network_or_refused(tmp_path):
    torch.manual_seed(0)
    source = Tiny()
    save_file(source.state_dict(), tmp_path / "tiny.safetensors")
    loaded = build_model(settings("recipe_nets:Tiny", weights=str(tmp_path / "tiny.safetensors")), {})
    assert torch.equal(loaded.fc.weight, source.fc.weight)
    with pytest.raises(CheckpointError, match="which both have, in other shapes"):
        build_model(settings("recipe_nets:Tiny", weights=str(tmp_path / "tiny.safetensors"), options={"classes": 3}), {})
    with pytest.raises(CheckpointError, match="which only the file has"):
        build_model(settings("recipe_nets:Tiny", weights=str(tmp_path / "tiny.safetensors"), options={"norm": False}), {})
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="can't be read as safetensors"):
        build_model(settings("recipe_nets:Tiny", weights=str(tmp_path / "bad.safetensors")), {})
