"""What `--help` of each command shows below its options; a test runs every line through the command's own parser."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "demo": (
        "geta demo",
        "geta demo --out runs/other --epochs 30 --seed 1 --sparsity 0.6 --bits 2,6",
    ),
    "analyze": (
        "geta analyze timm:resnet18",
        "geta analyze my_package.models:make_net --input-shape 1,3,224,224 --html graph.html",
        "geta analyze hf:gpt2 --only neurons --protect 'wte'",
        "geta analyze hf:config.json --memory --gpus 8 --sequence 4096",
        "geta analyze hf:bert --explain encoder.layer.0.intermediate.dense:0:3",
    ),
    "compress": (
        "geta compress digits",
        "geta compress digits train.epochs=10 sparsity=0.7 --out runs/narrow",
        "geta compress my.yaml --sweep sparsity=0.3,0.5,0.7",
        "geta compress --resume runs/digits",
    ),
    "evaluate": (
        "geta evaluate runs/digits",
        "geta evaluate runs/digits/compact --config digits --json -",
        "geta evaluate model --config my.yaml data.path=/data/cifar10",
    ),
    "inspect": (
        "geta inspect runs/demo/compact",
        "geta inspect runs/demo/compact --json -",
    ),
    "export": (
        "geta export runs/demo/compact --format onnx",
        "geta export runs/demo/compact --format onnx --int8-weights --out small.onnx",
        "geta export runs/demo/compact --format pt2 --dynamic all",
    ),
    "bench": (
        "geta bench runs/demo/compact --batch 1 --batch 64",
        "geta bench runs/small --dense my_package.models:make_net --input-shape 1,3,224,224 --json times.json",
    ),
    "report": (
        "geta report runs/demo",
        "geta report runs/a runs/b --out a-and-b.html",
        "geta report runs/sweep --json front.json",
    ),
    "latency": (
        "geta latency timm:resnet18",
        "geta latency my_package.models:make_net --input-shape 1,3,224,224 --integers --table table.json",
    ),
}


def epilog(command: str) -> str:
    """The examples of a command, one paragraph each, as typer wants them."""
    return "\n\n".join(("Examples:", *EXAMPLES[command]))
