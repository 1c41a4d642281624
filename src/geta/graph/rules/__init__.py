"""The rules of coupling, one per operator (not per module class, not per model).

To teach geta an operator, write a function of one `Context` and register it: `@rule("mylib::op")`.
"""

from geta.graph.rules import (
    complex,  # noqa: A004 - the module of complex numbers
    contraction,
    data_movement,
    elementwise,
    factories,
    normalization,
    quantizers,
    recurrent,
    reduction,
    reparametrized,
)
from geta.graph.rules.contraction import contract
from geta.graph.rules.elementwise import pointwise
from geta.graph.rules.registry import find_rule, rule

__all__ = [
    "complex",
    "contract",
    "contraction",
    "data_movement",
    "elementwise",
    "factories",
    "find_rule",
    "normalization",
    "pointwise",
    "quantizers",
    "recurrent",
    "reduction",
    "reparametrized",
    "rule",
]
