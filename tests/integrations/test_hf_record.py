"""Folders whose configuration is damaged or hostile: a CheckpointError that names the entry, and nothing is run."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from torch import nn

import geta
import hf_nets
from geta.errors import CheckpointError
from geta.integrations import hf
from geta.integrations.hf_record import Record, attributes_of

UP = "model.layers.0.mlp.up_proj.weight"
ATTENTION = "model.layers.0.self_attn"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model, example, _ = hf_nets.build("llama")
    graph = geta.analyze(model, (), example)
    uneven = {f.name: torch.arange(f.size) < (f.size // 2 if ".0." in f.name else 0) for f in graph.prunable_families}
    geta.save_pretrained(model, graph, folder, selection=uneven)
    return folder


def edited(saved, folder, edit) -> str:
    shutil.copytree(saved, folder)
    settings = json.loads((folder / "config.json").read_text())
    edit(settings)
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


def setting(*path, value):
    def edit(settings) -> None:
        for key in path[:-1]:
            settings = settings[key]
        settings[path[-1]] = value

    return edit


MALFORMED = {
    "no record": (lambda settings: settings.pop("geta"), "its entry 'geta' is None"),
    "no object": (setting("geta", value=[1]), r"its entry 'geta' is \[1\]"),
    "format": (setting("geta", "format", value=2), "geta.format is 2"),
    "unknown entry": (setting("geta", "code", value="import os"), "unknown entries: 'code'"),
    "model type": (setting("geta", "model_type", value="nope"), "'nope', which transformers"),
    "itself": (setting("geta", "model_type", value="geta"), "'geta', which transformers"),
    "no name": (setting("geta", "model_type", value=3), "geta.model_type is 3: it must be a name"),
    "no class": (lambda settings: settings["geta"].pop("class"), "geta.class is None"),
    "unknown class": (setting("geta", "class", value="Nope"), "'Nope', which is no model class of transformers"),
    "a path": (setting("geta", "class", value="os.system"), "'os.system', which is no model class"),
    "a module": (setting("geta", "class", value="pipelines"), "'pipelines', which is no model class"),
    "a configuration": (setting("geta", "class", value="LlamaConfig"), "'LlamaConfig', which is no model class"),
    "an Auto class": (setting("geta", "class", value="AutoModelForCausalLM"), "which is no model class"),
    "another model": (setting("geta", "class", value="BertModel"), "is not built from 'llama' configurations"),
    "shapes": (setting("geta", "shapes", value=[]), r"geta.shapes is \[\]: it must be an object"),
    "unknown tensor": (setting("geta", "shapes", "model.nope", value=[1]), "names a tensor 'model.nope' that LlamaForCausalLM does not"),
    "too large": (setting("geta", "shapes", UP, value=[49, None]), r"is \[49, None\], which is no part of the \[48, 32\]"),
    "rank": (setting("geta", "shapes", UP, value=[24]), r"is \[24\], which is no part of the \[48, 32\]"),
    "zero": (setting("geta", "shapes", UP, value=[0, None]), "must be a list of sizes"),
    "negative": (setting("geta", "shapes", UP, value=[-1, None]), "must be a list of sizes"),
    "fraction": (setting("geta", "shapes", UP, value=[1.5, None]), "must be a list of sizes"),
    "flag": (setting("geta", "shapes", UP, value=[True, None]), "must be a list of sizes"),
    "scalar": (setting("geta", "shapes", UP, value=24), "must be a list of sizes"),
    "unknown module": (setting("geta", "attributes", "model.nope", value={"a": 1}), "names a module 'model.nope'"),
    "unknown attribute": (setting("geta", "attributes", ATTENTION, value={"nope": 1}), "sets 'nope', which LlamaAttention does not have"),
    "method": (setting("geta", "attributes", ATTENTION, value={"forward": 1}), "sets 'forward', which LlamaAttention does not have"),
    "private": (setting("geta", "attributes", ATTENTION, value={"_modules": 1}), "only sizes can be set"),
    "class": (setting("geta", "attributes", ATTENTION, value={"__class__": 1}), "only sizes can be set"),
    "flag set": (setting("geta", "attributes", ATTENTION, value={"is_causal": 1}), "but it is True: only sizes"),
    "text set": (setting("geta", "attributes", ATTENTION, value={"head_dim": "8"}), "only sizes can be set"),
    "list for a number": (setting("geta", "attributes", ATTENTION, value={"head_dim": [8]}), "but it is 8: only sizes"),
    "text of a configuration": (setting("geta", "attributes", ATTENTION, value={"config.hidden_act": 3}), "but it is 'silu'"),
    "too deep": (setting("geta", "attributes", ATTENTION, value={"head_dim.real": 3}), "which int does not have"),
    "no attributes": (setting("geta", "attributes", ATTENTION, value=3), "it must be an object"),
    "base settings": (setting("hidden_size", value="wide"), "LlamaConfig refuses its settings"),
    "no part of it": (setting("intermediate_size", value=20), "which is no part of"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_configurations_are_refused(case, saved, tmp_path):
    edit, message = MALFORMED[case]
    folder = edited(saved, tmp_path / "edited", edit)
    with pytest.raises(CheckpointError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_code_beside_the_tensors_is_not_run(saved, tmp_path):
    def edit(settings) -> None:
        settings["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}

    folder = edited(saved, tmp_path / "edited", edit)
    (tmp_path / "edited" / "evil.py").write_text("raise RuntimeError('this ran')")
    for trust in (False, True):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
        assert type(loaded).__name__ == "GetaLlamaForCausalLM"


def test_a_record_of_another_class_is_no_configuration_of_this_one(saved):
    with pytest.raises(CheckpointError, match="is 'llama', which is not read by GetaBertConfig"):
        hf.GetaBertConfig.from_pretrained(saved)
    for name in ("GetaNope", "Gettysburg", "Getapipelines", "nope"):
        with pytest.raises(AttributeError, match="has no attribute"):
            getattr(hf, name)


class Nest(nn.Module):
    """A module with everything that a record can change: sizes, lists of sizes, an object's sizes, tied tensors, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(6.0))
        self.sizes, self.pair, self.width = [6, 4], (6, 4), 6
        self.config = transformers.LlamaConfig(intermediate_size=6)
        self.inner = nn.Module()
        self.inner.config = self.config


def test_a_record_is_applied_to_everything_that_it_names():
    model = Nest()
    weight = model.first.weight.detach().clone()
    attributes = {"": {"sizes": [3, 4], "pair": [3, 4], "width": 3, "config.intermediate_size": 3}, "first": {"out_features": 3}}
    record = Record("llama", "Nest", {"first.weight": [3, None], "table": [3]}, attributes)
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record
    record.apply(model)
    assert model.first.weight is model.second.weight
    assert torch.equal(model.first.weight, weight[:3])
    assert torch.equal(model.table, torch.arange(3.0))
    assert (model.sizes, model.pair, model.width, model.first.out_features) == ([3, 4], (3, 4), 3, 3)
    assert (model.config.intermediate_size, model.inner.config.intermediate_size) == (3, 6), "others share the object"
    with pytest.raises(CheckpointError, match="is no part of"):
        Record("llama", "Nest", {"table": [4]}, {}).apply(model)


def test_only_what_differs_is_recorded():
    model, built = Nest(), Nest()
    model.width, model.pair = 3, (3, 4)
    places = [("", ("width",)), ("first", ("in_features",)), ("", ("pair",)), ("", ("sizes",))]
    assert attributes_of(places, model, built) == {"": {"width": 3, "pair": [3, 4]}}
    with pytest.raises(CheckpointError, match="sets 'nope'"):
        attributes_of([("", ("nope",))], model, built)
    with pytest.raises(CheckpointError, match="module that the model does not have"):
        attributes_of([("nope", ("width",))], model, built)
    with pytest.raises(CheckpointError, match="only sizes can be set"):
        attributes_of([("", ("training",))], model, built)


def test_names_of_other_classes_over_the_same_base_are_found():
    model = nn.Module()
    model.layer = nn.Linear(4, 6, bias=False)
    record = Record("llama", "Other", {"model.layer.weight": [3, None], "head.weight": [2, None]}, {"model.layer": {"out_features": 3}})
    with pytest.raises(CheckpointError, match="that Other does not have"):
        record.apply(model, prefix="model")
    record.apply(model, prefix="model", strict=False)
    assert (model.layer.weight.shape, model.layer.out_features) == ((3, 4), 3)
