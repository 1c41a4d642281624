"""What torch.export records for nobody is left out, and everything is as before afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental import proxy_tensor

from geta.graph.bookkeeping import without_bookkeeping
from geta.graph.capture import capture


def test_a_graph_module_made_meanwhile_runs():
    layer, x = nn.Linear(4, 2), torch.randn(3, 4)
    with without_bookkeeping():
        made = fx.symbolic_trace(layer)
        later = fx.symbolic_trace(layer)
        torch.testing.assert_close(made(x), layer(x))
    torch.testing.assert_close(later(x), layer(x))
    assert "linear" in later.code


def test_everything_is_as_before_afterwards():
    before = fx.GraphModule.recompile, proxy_tensor._extract_tensor_metadata
    with pytest.raises(ValueError, match="inside"), without_bookkeeping():
        assert fx.GraphModule.recompile is not before[0]
        raise ValueError("inside")
    assert (fx.GraphModule.recompile, proxy_tensor._extract_tensor_metadata) == before


def test_captures_leave_it_out():
    nodes = list(capture(nn.Linear(4, 2), (torch.randn(3, 4),)).graph.nodes)
    assert any("val" in node.meta for node in nodes)
    assert not any(node.meta.get("tensor_meta") for node in nodes)
