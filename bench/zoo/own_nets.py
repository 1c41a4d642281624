"""Networks written for the tests (tests/zoo_nets.py and tests/nets.py), so that tests and zoo check the same ones."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from types import ModuleType

from .entry import Built, Entry

_TESTS = Path(__file__).resolve().parents[2] / "tests"
_FROM_NETS = "densenet_like mobilenet_v2_like resnet20_conv resnet20_pad shufflenet_like vgg7_bn".split()
_FROM_ZOO_NETS = """
yolo_v5_like yolo_v8_like carn carn_mobile_x3 rcan_x4 unet dit vae squeeze_excite conv3d gan_generator lstm gru lstm_bidirectional
gru_two_layers lstm_two_layers_bidirectional char_lstm multihead_attention transformer two_towers wavenet mlp_mixer pointnet conv_lstm
nerf graph_net dlrm residual_mlp siamese
""".split()


def _module(name: str) -> ModuleType:
    if str(_TESTS) not in sys.path:
        sys.path.append(str(_TESTS))
    return importlib.import_module(name)


def _from_nets(name: str) -> Built:
    built: Built = _module("nets").NETS[name]()
    return built


def _from_zoo_nets(name: str) -> Built:
    built: Built = _module("zoo_nets").ZOO_NETS[name]()
    return built


def entries() -> list[Entry]:
    found = [Entry(f"own/{name}", functools.partial(_from_zoo_nets, name)) for name in _FROM_ZOO_NETS]
    return found + [Entry(f"own/{name}", functools.partial(_from_nets, name)) for name in _FROM_NETS]
