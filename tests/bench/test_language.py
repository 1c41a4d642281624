"""The language bench at a size that takes seconds: every kind of case gives a whole record, and the table has a row for each."""

from __future__ import annotations

import math

import pytest
from bench.language import CASES, Case, Size

from bench import language

TINY = Size(hidden=32, layers=1, heads=4, inner=48, context=16, batch=2, steps=12, held_out=96)


@pytest.mark.parametrize("case", [Case(), Case(0.5, 4), Case(0.0, 2, "StableQAT")], ids=lambda case: case.name)
def test_every_kind_of_run_gives_a_whole_record(case, tmp_path, monkeypatch):
    monkeypatch.setattr(language, "_ROUNDS", 1)
    monkeypatch.setattr(language, "_WRITTEN", 4)
    found = language.record(case, 0, TINY, tmp_path)
    assert math.isfinite(found["perplexity"])
    assert 1.0 < found["perplexity"] < 400.0
    assert found["same tokens"]
    assert found["bytes"] > 0
    assert len(list(tmp_path.iterdir())) == 1
    (line,) = language.render({case: [found]})[2:]
    assert line.startswith(f"| {case.name} |")
    assert line.endswith("| 1 of 1 |")


def test_cases_have_names_of_their_own_and_text_is_held_out():
    assert len({case.name for case in CASES}) == len(CASES) == 9
    train, held_out = language.corpus()
    assert len(train) > 5 * len(held_out) > 1_000_000
    assert train.max() < 256
