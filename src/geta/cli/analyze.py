"""`geta analyze TARGET`: which parts of a network live and die together, and why some can't be removed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geta.cli.memory import MemoryOptions
from geta.cli.options import Debug
from geta.cli.output import JsonFile, Output, check_file
from geta.errors import BadModelError, ConfigError, UnsupportedOpError

if TYPE_CHECKING:
    from geta.graph import DependencyGraph


def parse_shape(text: str) -> tuple[int, ...]:
    """Read `1,3,224,224`; raises ConfigError for anything that is no list of positive numbers."""
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ConfigError(f"--input-shape '{text}' is no shape: write positive numbers, batch first, e.g. --input-shape 1,3,224,224")
    return shape


def parse_granularity(texts: list[str]) -> dict[str, str] | None:
    """Read `head_dim` and `GLOB=head_dim`; a value without a glob counts where no glob matches."""
    pairs = [text.rpartition("=") for text in texts]
    for_all = list(dict.fromkeys(value for glob, _, value in pairs if not glob))
    if len(for_all) > 1:
        raise ConfigError(f"--granularity is given for the whole model as {' and as '.join(for_all)}; write GLOB=VALUE for a part of it")
    named = {glob: value for glob, _, value in pairs if glob}
    return {**named, **dict(zip(("*",), for_all, strict=False))} or None


def parse_question(text: str) -> tuple[str, int, int]:
    """Read `conv1.weight:0:3` (tensor or module, dimension, index)."""
    name, *numbers = text.split(":")
    if not name or len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise ConfigError(f"--explain '{text}' is no question: write NAME:DIM:INDEX, e.g. --explain conv1.weight:0:3")
    return name, int(numbers[0]), int(numbers[1])


def costs_in_words(graph: DependencyGraph) -> str:
    """The table of `geta.cost.outlook`, or why there is none: families are worth printing all the same."""
    from geta.cost.outlook import outlook

    try:
        return str(outlook(graph))
    except (BadModelError, UnsupportedOpError) as error:
        return f"costs are not counted: {error}"


def analyze_command(  # noqa: PLR0913 - one parameter per option
    *,
    target: Annotated[str, typer.Argument(help="python.path:factory, timm:NAME or hf:CONFIG_OR_PATH.", show_default=False)],
    input_shape: Annotated[str | None, typer.Option(help="Shape of one random input, batch first, e.g. 1,3,224,224.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page with the graph and its families here.")] = None,
    json: JsonFile = None,
    protect: Annotated[list[str] | None, typer.Option(help="Glob of tensors or modules that keep their shapes; repeatable.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Prune these units alone, e.g. heads or channels; repeatable.")] = None,
    granularity: Annotated[list[str] | None, typer.Option(help="head, head_dim, group or channel, or GLOB=head_dim; repeatable.")] = None,
    inexact: Annotated[bool, typer.Option("--inexact", help="Allow removals that change the result a little (LayerNorm).")] = False,
    depth: Annotated[bool, typer.Option("--depth", help="Whole residual branches may go, too (unit: layers).")] = False,
    explain: Annotated[list[str] | None, typer.Option(help="Ask what an index takes with it: NAME:DIM:INDEX; repeatable.")] = None,
    costs: Annotated[bool, typer.Option(help="Count costs too: dense, with half of the groups, and at 8 and 4 bits.")] = True,
    memory: Annotated[bool, typer.Option("--memory", help="Plan the memory of training on each GPU, too.")] = False,
    gpus: Annotated[int | None, typer.Option(help="Over how many GPUs FSDP2 shards (1).")] = None,
    batch: Annotated[int | None, typer.Option(help="Examples per GPU and step, for --memory.")] = None,
    sequence: Annotated[int | None, typer.Option(help="Tokens per example, for --memory.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the parameters: fp32, bf16 or fp16 (the model's own).")] = None,
    compute_dtype: Annotated[str | None, typer.Option(help="Of forward and backward passes (the parameters').")] = None,
    optimizer: Annotated[str | None, typer.Option(help="A class of torch.optim with its defaults (adamw).")] = None,
    weight_bits: Annotated[str | None, typer.Option(help="Plan with quantized weights: 8 or 4,8.")] = None,
    activation_bits: Annotated[str | None, typer.Option(help="Plan with quantized activations.")] = None,
    debug: Debug = False,  # noqa: ARG001 - acts in its callback
) -> None:
    """Print the table of group families of a model: what can be removed together, the reason where nothing can, and what it costs.

    A factory is called without arguments and returns a model, (model, args) or (model, args, kwargs).
    """
    shape = None if input_shape is None else parse_shape(input_shape)
    wanted = parse_granularity(granularity or [])
    questions = [parse_question(text) for text in explain or []]
    training = MemoryOptions(gpus, batch, sequence, dtype, compute_dtype, optimizer, weight_bits, activation_bits)
    if memory:
        training.check()
    else:
        training.refuse()

    import geta
    from geta.cli.targets import resolve_target

    check_file(html, "--html")
    output = Output(json)
    found = resolve_target(target, shape)
    graph = geta.analyze(
        found.model,
        found.args,
        found.kwargs,
        exact=not inexact,
        protect=protect or (),
        prune=only or None,
        granularity=wanted,
        depth=depth,
    )
    output.line(str(graph))
    if costs:
        output.line(f"\n{costs_in_words(graph)}")
    if memory:
        output.line(f"\n{training.plan(graph, found)}")
    for question in questions:
        output.line(f"\n{graph.explain(*question)}")
    if html is not None:
        graph.save_html(html)
        output.line(f"page written to {html}")
    output.finish(graph.to_json(), "families")
