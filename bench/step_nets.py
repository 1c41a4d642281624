"""The networks of `bench.step_overhead`, without torchvision: two small CNNs for digits, a ResNet-50, a BERT-like and a Llama-like net."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from bench import joint_stage
from geta.recipes.nets.resnet import resnet20

_CLASSES = 10
_VOCABULARY = 1024


@dataclass(frozen=True)
class Task:
    """What one training step consists of.

    name, words: for the command line and the report. convolutional: whether its layers are convolutions.
    build: makes the network. inputs: one batch as keyword arguments, given the share of the usual batch size.
    loss:  of the network's output for these inputs. optimizer: the base optimizer over some parameters.
    """

    name: str
    words: str
    convolutional: bool
    build: Callable[[], nn.Module]
    inputs: Callable[[float], dict[str, Tensor]]
    loss: Callable[[Any], Tensor]
    optimizer: Callable[[Any], Optimizer]


class Whole(nn.Module):
    """A network around layers; nncf can't train a bare `nn.Sequential`."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """All layers in turn."""
        out: Tensor = self.layers(x)
        return out


def vgg7() -> nn.Module:
    """The VGG7 of `bench.joint_stage`."""
    return Whole(*joint_stage.vgg7().children())


class Bottleneck(nn.Module):
    """relu(1x1 -> 3x3 (strided) -> 1x1 to four times the width, plus the shortcut), each convolution with its norm."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, 4 width, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def resnet50() -> nn.Module:
    """The ResNet-50 of He et al. (arXiv 1512.03385, table 1), with the stride in the 3x3 convolutions."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    inputs = 64
    for stage, (width, depth) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(depth):
            layers.append(Bottleneck(inputs, width, 2 if stage and not block else 1))
            inputs = 4 * width
    return Whole(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def bert() -> nn.Module:
    """A sequence classifier of BERT's architecture: 4 layers of width 256, no dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=_VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = _CLASSES
    model: nn.Module = BertForSequenceClassification(config)
    return model.train()


def llama() -> nn.Module:
    """A causal language model of Llama's architecture: 4 layers of width 256, 4 heads that share 2 keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.train()


def _images(channels: int, size: int, batch: int) -> Callable[[float], dict[str, Tensor]]:
    return lambda share: {"input": torch.rand(_scaled(batch, share), channels, size, size)}


def _tokens(length: int, batch: int) -> Callable[[float], dict[str, Tensor]]:
    return lambda share: {"input_ids": torch.randint(_VOCABULARY, (_scaled(batch, share), length))}


def _scaled(batch: int, share: float) -> int:
    return max(2, round(batch * share))


def _classified(output: Any) -> Tensor:
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits, torch.arange(len(logits)) % _CLASSES)


def _next_token(output: Any) -> Tensor:
    logits: Tensor = output.logits
    flat = logits.flatten(0, 1)
    return F.cross_entropy(flat, torch.arange(len(flat)) % _VOCABULARY)


def _sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-4)


def _adamw(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4)


TASKS = {
    task.name: task
    for task in (
        Task("vgg7", "VGG7, 64 x 1x8x8, SGD with momentum", True, vgg7, _images(1, 8, 64), _classified, _sgd),
        Task("resnet20", "ResNet-20, 64 x 1x8x8, SGD with momentum", True, resnet20, _images(1, 8, 64), _classified, _sgd),
        Task("resnet50", "ResNet-50, 16 x 3x64x64, SGD with momentum", True, resnet50, _images(3, 64, 16), _classified, _sgd),
        Task("bert", "BERT-like, 16 x 64 tokens, AdamW", False, bert, _tokens(64, 16), _classified, _adamw),
        Task("llama", "Llama-like, 8 x 128 tokens, AdamW", False, llama, _tokens(128, 8), _next_token, _adamw),
    )
}
