"""Find attribute changes by trying them: run the sliced model beside the zeroed one and see how far the two agree.

The zeroed model's run is recorded module by module. A trial runs the sliced model with some attributes changed; its first problem is
an error, or the first module whose output has the recorded shape and other values. A change that moves the first problem further
is kept, and its like is tried on the modules that play the same part in other blocks, so that a deep model needs few trials.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.overrides import TorchFunctionMode

from geta.graph.places import first_line
from geta.graph.preserve import mode_of
from geta.subnet.attributes import HEAD_COUNTS, INNER_WIDTHS, Change, Proposal, Sizes, applied, proposals
from geta.subnet.comparison import max_difference

MOST_TRIALS = 600
MODULES_PER_PROBLEM = 16
PAIRS_PER_MODULE = 30
ALTERNATIVES = 3
INSIDE_TOLERANCE = 1e-3
"""Relative difference of a module's output above which it is the place to look at; the model's own output decides by its own tolerance."""


@dataclass(frozen=True)
class Call:
    """A finished call of a module and the tensors that it returned."""

    path: str
    tensors: list[torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """How far a trial got. calls: modules that finished before the first problem; steps: torch functions; path: the module at fault."""

    calls: int
    steps: int
    path: str
    problem: str
    finished: tuple[str, ...] = ()

    @property
    def score(self) -> tuple[bool, int, int]:
        return (not self.problem, self.calls, self.steps)


class _Steps(TorchFunctionMode):
    """Counts torch functions, so that two trials that fail in one module can be told apart."""

    count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Watch:
    """Records which modules finish, in order, and which are still running."""

    def __init__(self, model: nn.Module, seen: Callable[[Call], None]) -> None:
        self._model, self._seen = model, seen
        self.running: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        for path, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._entering(path)))
            self._handles.append(module.register_forward_hook(self._leaving(path)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def _entering(self, path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.running.append(path)

        return hook

    def _leaving(self, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, result: Any) -> None:
            self.running.pop()
            # clones: an in-place activation may overwrite what this module returned
            self._seen(Call(path, [leaf.detach().clone() for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]))

        return hook


def run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Outputs in evaluation mode as a flat list; the inputs are copied, because a model may write into them."""
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), (args, dict(kwargs)))
    with torch.no_grad(), mode_of(model, False):
        return pytree.tree_leaves(model(*args, **kwargs))


def type_and_line(error: BaseException) -> str:
    """Type and first line of an error; the type alone where the error says nothing."""
    return f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__


@dataclass
class Bench:
    """The zeroed model and the sliced one, side by side.

    sizes_near: module path -> what changed around it. tolerance: for the model's own output.
    renamed: path of a module of the zeroed model -> its path in the other; None where that hasn't got it.
    """

    zeroed: nn.Module
    small: nn.Module
    inputs: tuple[tuple[Any, ...], Mapping[str, Any]]
    sizes_near: Callable[[str], Sizes]
    tolerance: float
    renamed: Callable[[str], str | None] = str
    trials: int = 0
    _expected: list[Call] = field(default_factory=list)

    def difference(self) -> float:
        """Relative difference of the outputs; raises whatever the sliced model raises."""
        return max_difference(run(self.zeroed, *self.inputs), run(self.small, *self.inputs))[1]

    def attempt(self, changes: Sequence[Change]) -> Outcome:
        """Run the sliced model with these changes."""
        self.trials += 1
        if not self._expected:
            calls: list[Call] = []
            with Watch(self.zeroed, calls.append):
                run(self.zeroed, *self.inputs)
            names = [(self.renamed(call.path) if call.path else "", call) for call in calls]
            self._expected += [Call(name, call.tensors) for name, call in names if name is not None]
        steps = _Steps()
        finished: list[str] = []
        trouble: list[Outcome] = []

        def compare(call: Call) -> None:
            wanted = self._expected[len(finished)] if len(finished) < len(self._expected) else Call("", [])
            problem = "" if trouble and call.path else self._problem(wanted, call)
            if problem and not trouble:
                trouble.append(Outcome(len(finished), steps.count, call.path, problem, tuple(finished)))
            if not problem and not call.path:
                trouble.clear()  # the model's output is right, whatever a module inside it returns
            finished.append(call.path)

        with applied(self.small, changes), Watch(self.small, compare) as watch:
            try:
                with steps:
                    run(self.small, *self.inputs)
            except Exception as error:  # noqa: BLE001 - the user's forward raises what it likes; it is the answer of this trial
                where = watch.running[-1] if watch.running else ""
                trouble.append(Outcome(len(finished), steps.count, where, type_and_line(error), tuple(finished)))
        return trouble[0] if trouble else Outcome(len(finished), steps.count, "", "", tuple(finished))

    def _problem(self, wanted: Call, found: Call) -> str:
        if wanted.path != found.path:
            return "other modules run than in the zeroed model"
        whole = not found.path
        if not whole:
            pairs = [(a, b) for a, b in zip(wanted.tensors, found.tensors, strict=False) if a.shape == b.shape]
            gap = max_difference([a for a, _ in pairs], [b for _, b in pairs])[1]
        elif len(wanted.tensors) != len(found.tensors):
            return "the output has another structure"
        else:
            gap = max_difference(wanted.tensors, found.tensors)[1]
        if gap <= (self.tolerance if whole else INSIDE_TOLERANCE):
            return ""
        return f"the output differs by {gap:.2g} of the largest value"

    def search(self) -> tuple[list[Change], str]:
        """Changes after which the outputs agree and ""; else the changes that got furthest and in words what is left."""
        plain = self.attempt([])
        furthest: tuple[list[Change], Outcome] = ([], plain)
        stack = [furthest]
        while stack and self.trials < MOST_TRIALS:
            changes, outcome = stack.pop()
            if not outcome.problem:
                return changes, ""
            furthest = max(furthest, (changes, outcome), key=lambda state: state[1].score)
            stack += self._improvements(changes, outcome)
        changes, outcome = furthest
        if not changes:
            return changes, self._describe(plain)
        more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
        return changes, f"{self._describe(plain)}; then, with {changes[0]}{more}, {self._describe(outcome)}"

    def _describe(self, outcome: Outcome) -> str:
        kind = type(self.small.get_submodule(outcome.path)).__name__
        return f"in '{outcome.path or '(the model itself)'}' ({kind}): {outcome.problem}"

    def _improvements(self, changes: list[Change], now: Outcome) -> list[tuple[list[Change], Outcome]]:
        """The best alternatives from the nearest module that has any, best last."""
        changed = {(change.module, change.path) for change in changes}
        for path in itertools.islice(_around(now), MODULES_PER_PROBLEM):
            module = self.small.get_submodule(path)
            near = [p for p in proposals(path, module, self.sizes_near(path)) if (path, p.change.path) not in changed]
            better: list[tuple[list[Change], Outcome]] = []
            for group in itertools.chain(((one,) for one in near), _together(near)):
                if len(group) > 1 and better:
                    break
                outcome = self.attempt([*changes, *(one.change for one in group)])
                if outcome.score > now.score:
                    better += self._spread(changes, group, outcome)
                if (better and not better[-1][1].problem) or self.trials >= MOST_TRIALS:
                    break
            if better:
                return sorted(better, key=lambda option: option[1].score)[-ALTERNATIVES:]
        return []

    def _spread(self, changes: list[Change], group: Sequence[Proposal], outcome: Outcome) -> list[tuple[list[Change], Outcome]]:
        """The change, and after it the same change in all modules that play the same part, if nothing gets worse by it."""
        found = [*changes, *(one.change for one in group)]
        changed = {(change.module, change.path) for change in found}
        part = self._part(group[0].change.module)
        more: list[Change] = []
        for path, module in self.small.named_modules():
            if self._part(path) != part or path == group[0].change.module:
                continue
            near = proposals(path, module, self.sizes_near(path))
            for one in group:
                like = [p.change for p in near if (p.change.path, p.kind) == (one.change.path, one.kind)]
                more += [change for change in like[:1] if (path, change.path) not in changed]
        if not more:
            return [(found, outcome)]
        wide = self.attempt([*found, *more])
        return [(found, outcome), ([*found, *more], wide)] if wide.score >= outcome.score else [(found, outcome)]

    def _part(self, path: str) -> tuple[type[nn.Module], str]:
        """Class, and path without the numbers of the blocks: what `layers.0.attn` has in common with `layers.1.attn`."""
        return type(self.small.get_submodule(path)), ".".join("*" if step.isdigit() else step for step in path.split("."))

    def describing(self, changes: Sequence[Change]) -> list[Change]:
        """Numbers that the run above doesn't read but whose usual names say what they are: they should be true as well."""
        changed = {(change.module, change.path) for change in changes}
        more = []
        for path, module in self.small.named_modules():
            if type(module).__module__.startswith("torch."):
                continue
            sizes = self.sizes_near(f"{path}.")
            by_name: dict[tuple[str, ...], list[Change]] = {}
            for one in proposals(path, module, sizes):
                if _describes(one.change.path, one.kind) and (one.change.before, one.change.before) not in sizes.counts:
                    by_name.setdefault(one.change.path, []).append(one.change)
            more += [found[0] for name, found in by_name.items() if len(found) == 1 and (path, name) not in changed]
        return more if more and not self.attempt([*changes, *more]).problem else []


def _describes(name: tuple[str, ...], kind: str) -> bool:
    return len(name) == 1 and ((name[0] in HEAD_COUNTS and kind == "count") or (name[0] in INNER_WIDTHS and kind == "size"))


def _around(outcome: Outcome) -> Iterator[str]:
    """The module at fault; then each module around it, followed by what ran inside that one, latest first."""
    seen: set[str] = set()
    path, inner = outcome.path, [outcome.path]
    while True:
        for one in inner:
            if one not in seen:
                seen.add(one)
                yield one
        if not path and len(inner) != 1:
            return
        path = path.rpartition(".")[0] if path else path
        prefix = f"{path}." if path else ""
        inner = [path, *(one for one in reversed(outcome.finished) if one.startswith(prefix)), path]


def _together(near: Sequence[Proposal]) -> Iterator[tuple[Proposal, ...]]:
    """The likeliest value of every attribute with a usual name at once; then pairs of attributes."""
    best: dict[tuple[str, ...], Proposal] = {}
    for one in near:
        if one.rank < 10:
            best.setdefault(one.change.path, one)
    if len(best) > 2:
        yield tuple(best.values())
    pairs = (pair for pair in itertools.combinations(near, 2) if pair[0].change.path != pair[1].change.path)
    yield from itertools.islice(pairs, PAIRS_PER_MODULE)
