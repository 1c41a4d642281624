"""Graph analysis: capture a model, propagate labels, find the families of groups that can be removed."""

from geta.graph.dependency import DependencyGraph, analyze
from geta.graph.explain import Explanation
from geta.graph.families import Family, Member, Selection
from geta.graph.rules import rule

__all__ = ["DependencyGraph", "Explanation", "Family", "Member", "Selection", "analyze", "rule"]
