"""LSTM, GRU and plain RNN layers: the hidden units of all layers and directions that share one state tensor.

With the rows of a unit's gates zero and a zero initial state, the unit stays zero: an LSTM's cell is 0.5 c + 0.5 tanh(0),
a GRU's state 0.5 h + 0.5 tanh(0), a plain RNN's tanh(0) or relu(0).
"""

from __future__ import annotations

from typing import Any

from geta.graph.context import Context, Place, concrete_shape, narrow_dims
from geta.graph.labels import Track, Value, compress, make_value, squeezed
from geta.graph.rules.contraction import contract
from geta.graph.rules.elementwise import combine, zero_bit
from geta.graph.rules.registry import rule

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule(*[f"aten::{name}" for name in _GATES])
def recurrent(ctx: Context) -> Any:
    """One family of hidden units: all gates' rows of every layer, and the columns that read the state."""
    if "params" not in ctx.arguments or ctx.arguments.get("batch_sizes") is not None:
        return NotImplemented
    states = ctx["hx"] if isinstance(ctx["hx"], (tuple, list)) else [ctx["hx"]]
    x, hidden, ways = ctx["input"], states[0].shape[-1], 2 if ctx["bidirectional"] else 1
    each = 4 if ctx["has_biases"] else 2
    params = ctx["params"]
    if len(params) != each * ways * ctx["num_layers"] or any(len(t.dims) > 1 for value in (*params, *states) for t in value.tracks):
        return NotImplemented  # projections; weights computed in a way that no rule of rows and columns describes
    gates = _GATES[ctx.op]
    units: list[Value] = []
    readers: list[Value] = []
    lead = tuple(range(2, 1 + x.rank))
    for place in range(0, len(params), each):
        w_input, w_state, *biases = params[place : place + each]
        units += [_unit(ctx, value, 0, gates, hidden) for value in (w_input, w_state, *biases)]
        readers.append(_unit(ctx, w_state, 1, 1, hidden))
        if place < each * ways:  # the first layer reads the sequence itself
            shape = (*x.shape[:-1], w_input.shape[0])
            contract(ctx, Place(x, (*lead, 0)), Place(w_input, (1, 0)), (*lead, 1), shape)
        else:
            readers.append(_unit(ctx, w_input, 1, ways, hidden))
    starts = [_line(state, state.rank - 1) for state in states]
    ctx.align([Place(value, (0,)) for value in (*units, *readers, *starts)], 1)
    ctx.produce(*params, *[state for state in states if state.derived])
    for value in states:
        ctx.freeze(value, tuple(range(value.rank - 1)), f"is a state's batch or layer in {ctx.where}")
    ctx.freeze(x, tuple(range(x.rank - 1)), f"is run along in {ctx.where}")
    return _results(ctx, units, starts, readers)


def _unit(ctx: Context, value: Value, dim: int, parts: int, hidden: int) -> Value:
    """One dimension as [hidden], its `parts` (gates, directions) bound together."""
    line = _line(value, dim)
    tracks = []
    for track in line.tracks:
        code = track.code.unflatten(0, (parts, hidden))
        ctx.bind(code, (0,))
        ctx.constraints.units.append(((squeezed(code) >> 1).reshape(-1).numpy(), "hidden units"))
        tracks.append(Track(compress(narrow_dims(code, (0,))).reshape(hidden), track.origins))
    return Value((hidden,), tuple(tracks), value.derived)


def _line(value: Value, dim: int) -> Value:
    """The tracks along `dim` alone, as one-dimensional ones."""
    size = value.shape[dim]
    others = tuple(d for d in range(value.rank) if d != dim)
    tracks = tuple(Track(narrow_dims(t.code, others).reshape(size), t.origins) for t in value.tracks if t.dims == (dim,))
    return Value((size,), tracks, value.derived)


def _results(ctx: Context, units: list[Value], starts: list[Value], readers: list[Value]) -> Any:
    source = next((track for value in units for track in value.tracks), None)
    shapes = [concrete_shape(fake) for fake in ctx.node.meta["val"]]
    if source is None:
        return tuple(Value(shape) for shape in shapes)
    known = [*units, *starts]
    bits = [zero_bit(track.code) for value in known for track in value.tracks]
    zero = combine(bits, "and" if all(value.tracks for value in known) else "lose")
    code = source.code.bitwise_and(-2) | zero
    doubtful = zero == 0
    for value in readers:  # who reads a state that does not stay zero must be zero there itself
        for track in value.tracks:
            ctx.ledger.consumers |= track.origins
            ctx.ledger.demands.append((track.origins, track.code[doubtful] >> 1))
    results = []
    for shape in shapes:
        line = code.repeat(shape[-1] // len(code))
        view = [1] * (len(shape) - 1) + [shape[-1]]
        results.append(make_value(shape, [Track(line.reshape(view).expand(shape))], False))
    return tuple(results)
