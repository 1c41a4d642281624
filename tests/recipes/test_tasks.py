"""Tasks: every metric equals what its definition gives by hand, and sums over batches equal one batch."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError

import recipe_files
from geta.errors import BadModelError, ConfigError
from geta.recipes.data.choices import ChoicesData
from geta.recipes.data.squad import SquadData
from geta.recipes.tasks import TaskSettings
from geta.recipes.tasks.question_answering import f1, normalised

SETTINGS: TypeAdapter[Any] = TypeAdapter(TaskSettings)


def task(name: str, **keys: Any) -> Any:
    return SETTINGS.validate_python({"name": name, **keys})


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_classification_counts_right_answers_over_batches():
    job = task("classification")
    logits = torch.eye(4)
    batch = {"images": torch.zeros(4, 1), "labels": torch.tensor([0, 1, 3, 3])}
    halves = [{name: column[rows] for name, column in batch.items()} for rows in (slice(0, 3), slice(3, 4))]
    total = job.tally(logits[:3], halves[0]) + job.tally({"logits": logits[3:]}, halves[1])
    assert (job.score(total), total.dtype) == (75.0, torch.float64)
    assert job.score(total) == job.score(job.tally(logits, batch))
    assert job.call(batch)[0][0] is batch["images"]
    torch.testing.assert_close(job.loss(logits, batch), F.cross_entropy(logits, batch["labels"]))
    smooth = task("classification", label_smoothing=0.2).loss(logits, batch)
    torch.testing.assert_close(smooth, F.cross_entropy(logits, batch["labels"], label_smoothing=0.2))


def test_a_mixed_batch_has_a_mixed_loss():
    job, logits = task("classification"), draw(3, 4)
    batch = {"labels": torch.tensor([0, 1, 2]), "other_labels": torch.tensor([3, 3, 3]), "mix": torch.tensor([1.0, 0.5, 0.0])}
    nll = -logits.log_softmax(1)
    by_hand = (nll[0, 0] + 0.5 * nll[1, 1] + 0.5 * nll[1, 3] + nll[2, 3]) / 3
    torch.testing.assert_close(job.loss(logits, batch), by_hand)


def test_inputs_can_be_named_and_a_missing_column_is_an_error():
    batch = {"ids": torch.ones(1, 2), "ids_mask": torch.ones(1, 2), "labels": torch.zeros(1)}
    args, named = task("classification", inputs={"input_ids": "ids", "attention_mask": "ids_mask"}).call(batch)
    assert (args, list(named)) == ((), ["input_ids", "attention_mask"])
    with pytest.raises(ConfigError, match="classification needs the column 'images', and the data gives ids, ids_mask, labels"):
        task("classification").call(batch)


@pytest.mark.parametrize(("error", "by_hand"), [("mse", (1 + 4) / 2), ("l1", 1.5), ("smooth-l1", (0.5 + 1.5) / 2)])
def test_regression(error, by_hand):
    job = task("regression", error=error, inputs=["features"])
    batch = {"features": torch.zeros(2, 3), "targets": torch.tensor([0.0, 2.0])}
    output = torch.tensor([[1.0], [0.0]])
    assert float(job.loss(output, batch)) == by_hand
    assert job.score(job.tally(output, batch)) == pytest.approx(math.sqrt(2.5))
    assert not job.metric.higher_is_better
    assert job.loss(output.bfloat16(), batch).dtype == torch.float32
    with pytest.raises(BadModelError, match=r"the model returns \(2, 3\), and the targets are \(2,\)"):
        job.loss(torch.zeros(2, 3), batch)


def test_mean_intersection_over_union_by_hand():
    job = task("segmentation")
    labels = torch.tensor([[[0, 0, 1], [1, 255, 0]]])
    predicted = torch.tensor([[[0, 1, 1], [1, 2, 0]]])
    logits = F.one_hot(predicted, 4).permute(0, 3, 1, 2).float()
    total = job.tally(logits, {"labels": labels})
    assert total.sum() == 5
    assert job.score(total) == pytest.approx(100 * (2 / 3 + 2 / 3) / 2)  # classes 2 and 3 occur nowhere that counts
    half = logits.repeat_interleave(2, 2).repeat_interleave(2, 3)
    twice = {"labels": labels.repeat_interleave(2, 1).repeat_interleave(2, 2)}
    assert job.score(job.tally(half, twice)) == job.score(total)
    assert job.loss(logits[..., :2], {"labels": labels}).isfinite()


def test_peak_signal_to_noise_ratio_by_hand():
    batch = {"images": torch.zeros(1, 3, 4, 4), "targets": torch.full((1, 3, 8, 8), 0.6)}
    output = batch["targets"].clone()
    output[:, :, 4, 4] += 10.2 / 255  # rounds to 10 steps of 8 bits
    output[:, :, 0] = 0.0  # inside of the border
    rgb = task("super-resolution", channel="rgb")
    assert rgb.score(rgb.tally(output, batch)) == pytest.approx(10 * math.log10(16 / (10 / 255) ** 2))
    luma = task("super-resolution", border=3)
    share = (65.481 + 128.553 + 24.966) / 255
    assert luma.score(luma.tally(output, batch)) == pytest.approx(10 * math.log10(4 / (share * 10 / 255) ** 2))
    assert luma.score(luma.tally(batch["targets"], batch)) == 100.0
    assert float(luma.loss(output, batch)) == pytest.approx(float((output - batch["targets"]).abs().mean()))
    with pytest.raises(BadModelError, match=r"do data\.scale and the model's scale agree"):
        luma.loss(output[..., :4], batch)


def test_perplexity_per_token_and_per_byte():
    tokens = torch.tensor([[1, 2, 0, 3]])
    batch = {"tokens": tokens, "bytes": torch.tensor([6])}
    logits = torch.zeros(1, 3, 4)
    per_token, per_byte = task("language-modelling"), task("language-modelling", unit="byte", argument="input_ids")
    assert per_token.score(per_token.tally(logits, batch)) == pytest.approx(4.0)
    assert per_byte.score(per_byte.tally(SimpleNamespace(logits=logits), batch)) == pytest.approx(2.0)
    assert per_byte.call(batch)[1]["input_ids"].tolist() == [[1, 2, 0]]
    sure = 50.0 * F.one_hot(tokens[:, 1:], 4).float()
    assert float(per_token.loss(sure, batch)) < 1e-6


def test_retrieval_takes_equal_captions_for_right():
    job = task("image-text", evaluation_batch=3)
    batch = {"images": torch.zeros(3, 1), "tokens": torch.tensor([[1, 2], [3, 4], [1, 2]])}
    features = torch.eye(3)
    swapped = features[[2, 1, 0]]
    assert job.score(job.tally((features, features), batch)) == 100.0
    assert job.score(job.tally((features, swapped), batch)) == 100.0
    wrong = features[[1, 0, 2]]
    assert job.score(job.tally((features, wrong), batch)) == pytest.approx(100 / 3)
    logits = draw(3, 3)
    rows, columns = -logits.log_softmax(1), -logits.log_softmax(0)
    half = [(rows[0, 0] + rows[0, 2]) / 2, rows[1, 1], (rows[2, 0] + rows[2, 2]) / 2]
    other = [(columns[0, 0] + columns[2, 0]) / 2, columns[1, 1], (columns[0, 2] + columns[2, 2]) / 2]
    torch.testing.assert_close(job.loss({"logits_per_image": logits}, batch), (sum(half) + sum(other)) / 6)
    assert (job.evaluation_batch, job.metric.name) == (3, "retrieval accuracy among 3")


def test_choices_are_compared_by_their_likelihood(tmp_path):
    data = ChoicesData(source="choices", path=recipe_files.choices(tmp_path)).load()
    batch = data.test.batch([0, 1])
    job = task("multiple-choice")
    tokens = job.call(batch)[0][0]
    assert tokens.shape == (6, batch["tokens"].shape[2])
    uniform = torch.zeros(*tokens.shape, 256)
    lengths = batch["answer_mask"].sum(2)
    assert lengths[1].tolist() == [6, 13, 4]
    likely = job._log_likelihoods(uniform, batch)[0]
    torch.testing.assert_close(likely, -lengths * math.log(256))
    assert job.score(job.tally(uniform, batch)) == 50.0  # the shortest wins: right for the first question, wrong for the second
    fair = task("multiple-choice", normalise="bytes")
    assert fair.score(fair.tally(uniform, batch)) == 50.0  # 7/6 > 13/12: now the longest wins
    assert fair._scores(likely, batch)[1].argmax() == 1
    assert float(job.loss(uniform, batch)) == pytest.approx(math.log(256))
    by_score = task("multiple-choice", objective="choices").loss(uniform, batch)
    torch.testing.assert_close(by_score, F.cross_entropy(job._scores(likely, batch), batch["labels"]))


@pytest.mark.parametrize(
    ("given", "wanted", "score"),
    [
        ("The Eiffel-Tower!", "eiffeltower", 1.0),
        ("an old  red tower", "the red tower", 0.8),
        ("red red", "red", 2 / 3),
        ("", "red", 0.0),
        ("the", "a", 1.0),
    ],
)
def test_f1_of_answers(given, wanted, score):
    assert f1(given, wanted) == pytest.approx(score)
    assert (normalised(given) == normalised(wanted)) == (score == 1.0)


def test_the_best_span_of_all_windows_is_the_answer(tmp_path):
    recipe_files.squad(tmp_path)
    known = str(recipe_files.tokenizer(tmp_path / "tokenizer.json"))
    data = SquadData(source="squad", path=tmp_path, tokenizer=known, length=24, stride=8).load()
    rows = data.test.rows
    batch = data.test.batch(range(len(rows)))
    exact = task("question-answering", measure="exact-match")
    assert exact.call(batch)[1]["input_ids"].shape == (9, 24)
    start, end = torch.zeros(3, 3, 24), torch.zeros(3, 3, 24)
    for row, asked in enumerate(rows):
        for number, window in enumerate(asked.windows):
            if window.start:
                start[row, number, window.start] = end[row, number, window.end] = 9.0
    start[:, :, 0] = end[:, :, 0] = 99.0  # outside of the text: no answer
    output = SimpleNamespace(start_logits=start.flatten(0, 1), end_logits=end.flatten(0, 1))
    assert exact.score(exact.tally(output, batch)) == 100.0
    longer = torch.stack([start, end.roll(1, 2)], dim=-1).flatten(0, 1)
    both = task("question-answering"), exact
    assert [round(job.score(job.tally(longer, batch)), 1) for job in both] == [
        round(100 * (2 / 3 + 4 / 5 + 2 / 3) / 3, 1),
        0.0,
    ]  # articles don't count
    backwards = torch.stack([end.roll(5, 2), start], dim=-1).flatten(0, 1)
    assert exact.score(exact.tally(backwards, batch)) == 0.0
    with pytest.raises(BadModelError, match="`start_logits` and `end_logits`"):
        exact.tally(torch.zeros(9, 24), batch)


def test_padding_takes_no_part_in_the_loss_of_spans(tmp_path):
    recipe_files.squad(tmp_path, length=6)
    known = str(recipe_files.tokenizer(tmp_path / "tokenizer.json"))
    data = SquadData(source="squad", path=tmp_path, tokenizer=known, length=24, stride=8).load()
    batch, job = data.train.batch([0, 1]), task("question-answering")
    real = batch["mask"].sum(1).double()
    torch.testing.assert_close(job.loss(torch.zeros(2, 24, 2, dtype=torch.float64), batch), real.log().mean())


def test_settings_are_checked_and_survive_being_written_down():
    job = task("super-resolution", error="mse", border=4)
    assert SETTINGS.validate_python(json.loads(job.model_dump_json())) == job
    named = task("classification", inputs={"x": "images"})
    assert SETTINGS.validate_python(json.loads(named.model_dump_json())) == named
    with pytest.raises(ValidationError, match="less than 1"):
        task("classification", label_smoothing=1.0)
    with pytest.raises(ValidationError, match="does not match any of the expected tags"):
        task("clasification")
