"""The rules of coupling, one per operator (not per module class, not per model).

To teach geta an operator, write a function of one `Context` and register it: `@rule("mylib::op")`.
"""

from geta.graph.rules import contraction, data_movement, elementwise, factories, normalization, reduction
from geta.graph.rules.registry import find_rule, rule

__all__ = ["contraction", "data_movement", "elementwise", "factories", "find_rule", "normalization", "reduction", "rule"]
