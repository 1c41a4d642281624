"""A hypothesis strategy for small random networks: `random_nets()` draws plain data, `build(spec)` makes the network.

A spec prints as nested dictionaries and lists, so a failing example can be pasted back into `build`. Every network runs
forward by construction: each block is drawn for the shape that the blocks before it give.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from nets import BATCH, randomize
from random_blocks import ACTIVATIONS, BLOCKS, Body, Shape, Spec, shape_after, width

Draw = Callable[[st.SearchStrategy[Any]], Any]
Options = dict[str, Any]
WIDTHS = (2, 3, 4, 6, 8, 12)
MAX_ELEMENTS = 2048  # per sample


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def one(draw: Draw, *values: Any) -> Any:
    """Draw one of the values."""
    return draw(st.sampled_from(values))


def flag(draw: Draw) -> bool:
    """Draw a bool."""
    return bool(draw(st.booleans()))


def act_name(draw: Draw) -> str:
    """Draw the name of an activation."""
    return str(draw(st.sampled_from(sorted(ACTIVATIONS))))


# One function per block: given the shape, draw the block's options, or return None when the block can't run on that shape.


def _project(draw: Draw, shape: Shape) -> Options | None:
    return {"out": one(draw, *WIDTHS), "bias": flag(draw)}


def _conv(draw: Draw, shape: Shape) -> Options | None:
    if len(shape) != 3:
        return None
    kind = one(draw, "plain", "plain", "depthwise", "grouped")
    channels = shape[0]
    out = channels * one(draw, 1, 2) if kind == "depthwise" else one(draw, *WIDTHS)
    shared = divisors(math.gcd(channels, out))
    groups = {"plain": 1, "depthwise": channels}.get(kind) or draw(st.sampled_from(shared))
    kernel = one(draw, 1, 3)
    padding = kernel // 2 if min(shape[1:]) < kernel else draw(st.integers(0, kernel // 2))
    return {"out": out, "kernel": kernel, "stride": one(draw, 1, 1, 2), "padding": padding, "groups": groups, "bias": flag(draw)}


def _transposed_conv(draw: Draw, shape: Shape) -> Options | None:
    if len(shape) != 3:
        return None
    out = one(draw, *WIDTHS)
    return {"out": out, "stride": one(draw, 1, 2), "groups": one(draw, *divisors(math.gcd(shape[0], out))), "bias": flag(draw)}


def _conv1d(draw: Draw, shape: Shape) -> Options | None:
    if len(shape) != 2:
        return None
    out = one(draw, *WIDTHS)
    return {"out": out, "groups": one(draw, *divisors(math.gcd(shape[1], out))), "bias": flag(draw)}


def _norm(draw: Draw, shape: Shape) -> Options | None:
    kinds = ["batch", "batch", "layer", "layer_all", "rms"]
    if len(shape) != 2 and width(shape) > 1:
        kinds.append("group")
    if len(shape) == 3 and shape[1] * shape[2] > 1:
        kinds.append("instance")
    kind = draw(st.sampled_from(kinds))
    groups = one(draw, *divisors(width(shape))) if kind == "group" else 1
    if kind == "group" and math.prod(shape) // groups == 1:
        groups = 1
    return {"kind": kind, "groups": groups, "affine": flag(draw)}


def _act(draw: Draw, shape: Shape) -> Options | None:
    return {"name": act_name(draw)}


def _prelu(draw: Draw, shape: Shape) -> Options | None:
    return {"shared": flag(draw)}


def _affine(draw: Draw, shape: Shape) -> Options | None:
    scale = flag(draw)
    return {"scale": scale, "bias": flag(draw) or not scale, "scalar": one(draw, False, False, True)}


def _residual(draw: Draw, shape: Shape) -> Options | None:
    body = draw_body(draw, shape, width(shape))
    return {"body": body, "op": one(draw, "add", "add", "add_inplace", "sub", "mul", "maximum")}


def _squeeze(draw: Draw, shape: Shape) -> Options | None:
    return {"hidden": one(draw, 2, 3, 4)} if len(shape) > 1 else None


def _gated(draw: Draw, shape: Shape) -> Options | None:
    return {"act": act_name(draw)} if width(shape) % 2 == 0 else None


def _branches(draw: Draw, shape: Shape) -> Options | None:
    op = one(draw, "cat", "cat", "stack")
    out = one(draw, *WIDTHS) if op == "stack" else None
    return {"bodies": [draw_body(draw, shape, out) for _ in range(draw(st.integers(2, 3)))], "op": op}


def _split(draw: Draw, shape: Shape) -> Options | None:
    channels = width(shape)
    if channels < 2:
        return None
    cuts = sorted(draw(st.sets(st.integers(1, channels - 1), min_size=1, max_size=2)))
    edges = [0, *cuts, channels]
    sizes = [after - before for before, after in itertools.pairwise(edges)]
    order = draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=3))
    return {"sizes": sizes, "acts": [act_name(draw) for _ in sizes], "order": order}


def _slice(draw: Draw, shape: Shape) -> Options | None:
    channels = width(shape)
    start = draw(st.integers(0, channels - 1))
    return {"start": start, "stop": draw(st.integers(start + 1, channels)), "step": one(draw, 1, 1, 2)}


def _shuffle(draw: Draw, shape: Shape) -> Options | None:
    return {"groups": one(draw, *divisors(width(shape)))}


def _reorder(draw: Draw, shape: Shape) -> Options | None:
    return {"kind": one(draw, "flip", "roll", "index"), "shift": draw(st.integers(0, 3))}


def _pad(draw: Draw, shape: Shape) -> Options | None:
    return {"before": draw(st.integers(0, 2)), "after": draw(st.integers(0, 2)), "value": one(draw, 0.0, 0.0, 0.7)}


def _fold(draw: Draw, shape: Shape) -> Options | None:
    return {"groups": one(draw, *divisors(width(shape))), "inner": flag(draw), "op": one(draw, "sum", "mean", "amax")}


def _across(draw: Draw, shape: Shape) -> Options | None:
    return {"op": one(draw, "softmax", "cumsum", "sort", "normalize", "center")}


def _pool(draw: Draw, shape: Shape) -> Options | None:
    if len(shape) != 3:
        return None
    small = min(shape[1:]) < 2
    return {"kind": one(draw, "global", "upsample") if small else one(draw, "max", "avg", "global", "upsample")}


def _pixel_shuffle(draw: Draw, shape: Shape) -> Options | None:
    return {} if len(shape) == 3 and shape[0] % 4 == 0 else None


def _switch(draw: Draw, shape: Shape) -> Options | None:
    kinds = {3: ["tokens", "tokens", "flatten", "mean", "max"], 2: ["flatten", "mean", "max", "first"]}.get(len(shape))
    return None if kinds is None else {"kind": draw(st.sampled_from(kinds))}


def _tied(draw: Draw, shape: Shape) -> Options | None:
    return {"hidden": one(draw, *WIDTHS), "transpose": flag(draw)}


def _matmul(draw: Draw, shape: Shape) -> Options | None:
    return {"out": one(draw, *WIDTHS), "einsum": flag(draw)} if len(shape) < 3 else None


def _attention(draw: Draw, shape: Shape) -> Options | None:
    if len(shape) != 2:
        return None
    heads = one(draw, 1, 2, 4)
    return {
        "heads": heads,
        "groups": one(draw, *divisors(heads)),
        "head": one(draw, 2, 3, 4),
        "fused": flag(draw),
        "repeat": one(draw, "interleave", "expand"),
        "sdpa": flag(draw),
        "causal": flag(draw),
    }


def _torch_attention(draw: Draw, shape: Shape) -> Options | None:
    return {"heads": one(draw, *divisors(shape[1])), "weights": flag(draw)} if len(shape) == 2 else None


Drawer = Callable[[Draw, Shape], "Options | None"]
DRAWERS: dict[str, Drawer] = {
    "Project": _project,
    "Conv": _conv,
    "TransposedConv": _transposed_conv,
    "Conv1d": _conv1d,
    "Norm": _norm,
    "Act": _act,
    "PReLU": _prelu,
    "Affine": _affine,
    "Residual": _residual,
    "Squeeze": _squeeze,
    "Gated": _gated,
    "Branches": _branches,
    "Split": _split,
    "Slice": _slice,
    "Shuffle": _shuffle,
    "Reorder": _reorder,
    "Pad": _pad,
    "Fold": _fold,
    "AcrossChannels": _across,
    "Pool": _pool,
    "PixelShuffle": _pixel_shuffle,
    "Switch": _switch,
    "Tied": _tied,
    "MatMul": _matmul,
    "Attention": _attention,
    "TorchAttention": _torch_attention,
}
assert sorted(DRAWERS) == sorted(BLOCKS)
IMAGE_ONLY = ("Conv", "TransposedConv", "Pool", "PixelShuffle")
TOKENS_ONLY = ("Conv1d", "Attention", "TorchAttention")
COMMON = ("Project", "Norm", "Act")  # listed again: they make what is to be pruned
RARE = ("AcrossChannels", "Fold", "Pad", "Slice")
IN_BODY = ("Project", "Norm", "Act", "Act", "Affine", "Reorder", "Shuffle")  # blocks that keep the positions


def _menu(shape: Shape) -> list[str]:
    """Return the blocks to choose from; a name that is listed twice is drawn twice as often."""
    absent = {3: TOKENS_ONLY, 2: IMAGE_ONLY}.get(len(shape), IMAGE_ONLY + TOKENS_ONLY + ("Squeeze", "Switch"))
    names = [name for name in DRAWERS if name not in absent]
    favourites = {3: ("Conv",) * 6 + IMAGE_ONLY, 2: TOKENS_ONLY[1:] * 2}.get(len(shape), ("Project",) * 2)
    return [*COMMON, *favourites, *(name for name in names if name not in RARE), *names]


def draw_body(draw: Draw, shape: Shape, out: int | None) -> Spec:
    """Draw one or two blocks that keep the positions, then a projection to `out` channels (None: any number)."""
    body: Spec = []
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(IN_BODY))
        body.append([name, DRAWERS[name](draw, _after(shape, body))])
    same_conv = len(shape) == 3 and flag(draw)
    target = out if out is not None else one(draw, *WIDTHS)
    if same_conv:
        options = {"out": target, "kernel": 3, "stride": 1, "padding": 1, "groups": 1, "bias": flag(draw)}
        body.append(["Conv", options])
    elif out is not None or flag(draw):
        body.append(["Project", {"out": target, "bias": flag(draw)}])
    return body


def _after(shape: Shape, spec: Spec) -> Shape:
    return shape_after(Body(shape, spec), shape)


class RandomNet(nn.Module):
    """The network of a spec: [embedding], blocks, [head]; returns its last tensor, or that and the one after block `tap`."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        kind, *shape = spec["input"]
        self.embedding = nn.Embedding(spec["vocabulary"], shape[1]) if kind == "ids" else None
        self.tap = spec["tap"]
        self.body = Body(tuple(shape), spec["blocks"])

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.embedding is not None:
            x = self.embedding(x)
        kept = x
        for number, step in enumerate(self.body.steps):
            x = step(x)
            if number == self.tap:
                kept = x
        return x if self.tap is None else (x, kept)


def build(spec: dict[str, Any]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Make the network of a spec, in eval mode, and its example inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec["seed"])
        model = randomize(RandomNet(spec), spec["seed"])
        kind, *shape = spec["input"]
        dtype = getattr(torch, spec["dtype"])
        x = torch.randint(0, spec["vocabulary"], (BATCH, shape[0])) if kind == "ids" else torch.randn(BATCH, *shape, dtype=dtype)
    return model.to(dtype).eval(), (x,)


@st.composite
def random_nets(draw: Draw, dtypes: tuple[str, ...] = ("float64",), min_blocks: int = 3, max_blocks: int = 8) -> dict[str, Any]:
    """Draw the spec of a small network: input layout, 3 to 8 blocks, an optional head and an optional second output."""
    kind = one(draw, "image", "image", "image", "tokens", "ids", "flat")
    side = st.integers(3, 6)
    channels = one(draw, *WIDTHS)
    layouts = {"image": [channels, draw(side), draw(side)], "flat": [channels]}
    shape: Shape = tuple(layouts.get(kind, [draw(side), channels]))
    spec: dict[str, Any] = {"dtype": one(draw, *dtypes), "seed": draw(st.integers(0, 999)), "input": [kind, *shape], "vocabulary": 11}
    blocks: Spec = []
    for _ in range(draw(st.integers(min_blocks, max_blocks))):
        name = draw(st.sampled_from(_menu(shape)))
        options = DRAWERS[name](draw, shape)
        if options is None:
            name, options = "Act", {"name": act_name(draw)}
        after = _after(shape, [[name, options]])
        if math.prod(after) > MAX_ELEMENTS:
            name, options = "Project", {"out": 4, "bias": True}
            after = _after(shape, [[name, options]])
        blocks.append([name, options])
        shape = after
    if one(draw, True, True, True, False):
        blocks.append(["Project", {"out": 3, "bias": True}])
    spec["tap"] = draw(st.one_of(st.none(), st.none(), st.integers(0, len(blocks) - 1)))
    return {**spec, "blocks": blocks}
