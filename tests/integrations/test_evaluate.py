"""Perplexity against sums by hand, over every kind of model; and lm-eval with a compact model inside."""

from __future__ import annotations

import math
import sys
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import geta
from geta.errors import BadModelError, ConfigError, GetaError
from geta.integrations.evaluate import lm_eval_model, perplexity

TOKENS = torch.randint(0, 11, (23,), generator=torch.Generator().manual_seed(4))


class Recent(nn.Module):
    """Scores that depend on all tokens before, the nearer the more."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner, self.head = nn.Embedding(11, 8), nn.Linear(8, 16), nn.Linear(16, 11)
        self.calls: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(tuple(x.shape))
        seen = torch.stack([(self.embed(x[:, : i + 1]) * torch.arange(1, i + 2)[:, None]).mean(1) for i in range(x.shape[1])], 1)
        return self.head(torch.relu(self.inner(seen)))


def by_hand(model: nn.Module, tokens: Tensor, window: int, stride: int) -> float:
    """One token at a time: find the first window that reaches it, ask for its probability given what is before it there."""
    length = min(window, len(tokens))
    begins = [begin for begin in range(0, len(tokens), stride) if begin + length < len(tokens)] + [len(tokens) - length]
    logs = []
    for i, token in enumerate(tokens.tolist()):
        begin = next(begin for begin in begins if begin <= i < begin + length)
        if i > begin:
            with torch.no_grad():
                logs.append(math.log(torch.softmax(model(tokens[None, begin:i])[0, -1].double(), 0)[token].item()))
    return math.exp(-sum(logs) / len(logs))


@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 8), (8, 1), (8, 7), (5, 3), (23, 1), (23, 23), (100, 50), (2, 1), (2, 2)])
def test_equals_a_sum_over_single_tokens(window, stride):
    model = Recent()
    expected = by_hand(model, TOKENS, window, stride)
    for batch_size in (1, 3):
        assert perplexity(model, TOKENS, window=window, stride=stride, batch_size=batch_size) == pytest.approx(expected, rel=1e-6)
    assert perplexity(model, TOKENS.tolist(), window=window, stride=stride) == pytest.approx(expected, rel=1e-6)


def test_a_model_that_knows_frequencies_alone_has_their_cross_entropy():
    """Without context: exp of the cross entropy between the counted and the predicted frequencies, whatever the windows."""
    counts = Counter(TOKENS[1:].tolist())
    model = lambda ids: torch.log(torch.arange(1.0, 12.0)).expand(*ids.shape, 11)  # noqa: E731
    expected = math.exp(-sum(n * math.log((token + 1) / 66) for token, n in counts.items()) / 22)
    assert perplexity(model, TOKENS, window=6, stride=2) == pytest.approx(expected, rel=1e-6)


def test_a_compact_model_whose_length_stayed_open_takes_any_window():
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 11))
    length = torch.export.Dim("length", min=2, max=64)
    graph = geta.analyze(model, (TOKENS[None, :8],), dynamic_shapes={"input": {1: length}})
    small = geta.compact(model, graph, graph.random_selection(0.5))
    graph.zero_(model, graph.random_selection(0.5))
    assert perplexity(small, TOKENS, window=11, stride=4) == pytest.approx(perplexity(model, TOKENS, window=11, stride=4), rel=1e-5)


def test_every_token_is_computed_in_windows_of_one_length():
    model = Recent()
    perplexity(model, TOKENS, window=8, stride=4, batch_size=2)
    assert model.calls == [(2, 8), (2, 8), (1, 8)]  # at 0, 4, 8, 12, 15


@pytest.fixture(scope="module")
def compressed() -> tuple[nn.Module, geta.Compressor]:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, use_cache=False)
    model = GPT2LMHeadModel(config)
    batch = torch.randint(0, 11, (8, 8))
    example = {"input_ids": batch[:2], "attention_mask": torch.ones_like(batch[:2])}
    compressor = geta.Compressor(model, kwargs=example, sparsity=0.5, weight_bits=(4, 8))
    optimizer = compressor.optimizer(torch.optim.AdamW, lr=1e-2, total_steps=12)
    for _ in range(12):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return model, compressor


def test_trained_compact_and_eager_models_agree(compressed):
    """The trained model is in training mode, and stays in it."""
    model, compressor = compressed
    model.train()
    asked: dict[str, Any] = {"window": 8, "stride": 4}
    expected = perplexity(model, TOKENS, **asked)
    assert model.training
    assert perplexity(lambda ids: model(ids).logits if model.eval() else None, TOKENS, **asked) == pytest.approx(expected, rel=1e-6)
    small = compressor.finish()
    assert perplexity(small, TOKENS, **asked) == pytest.approx(expected, rel=1e-4)
    assert perplexity(small, TOKENS, batch_size=4, **asked) == pytest.approx(expected, rel=1e-4)
    assert perplexity(compressor.finish("eager"), TOKENS, **asked) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": 1, "stride": 1}, "window is 1"),
        ({"window": 4, "stride": 5}, "stride is 5"),
        ({"window": 4, "stride": 0}, "stride is 0"),
        ({"window": 4, "stride": 2, "batch_size": 0}, "batch_size is 0"),
        ({"window": 4, "stride": 2, "tokens": [3]}, "at least two whole numbers"),
        ({"window": 4, "stride": 2, "tokens": [[3, 4]]}, "shape \\(1, 2\\)"),
        ({"window": 4, "stride": 2, "tokens": [0.5, 1.0]}, "torch.float32"),
        ({"window": 4, "stride": 2, "tokens": [3, -100]}, "negative number -100"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        perplexity(Recent(), **{"tokens": TOKENS, **settings})


def test_models_that_do_not_predict_tokens_are_refused():
    with pytest.raises(ConfigError, match=r"scores of shape \(1, 11\) for tokens \(1, 4\)"):
        perplexity(lambda ids: torch.zeros(1, 11), TOKENS, window=4, stride=4)
    with pytest.raises(ConfigError, match=r"the model returned tuple.*perplexity needs a causal language model"):
        perplexity(lambda ids: (ids,), TOKENS, window=4, stride=4)
    with pytest.raises(GetaError, match="logits aren't finite"):
        perplexity(lambda ids: torch.full((*ids.shape, 11), math.nan), TOKENS, window=4, stride=4)
    x = torch.randn(2, 4)
    other = geta.compact(net := nn.Bilinear(4, 4, 3), geta.analyze(net, (x, x)))
    with pytest.raises(ConfigError, match="captured with 2 arguments"):
        perplexity(other, TOKENS, window=4, stride=4)


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({letter: i for i, letter in enumerate("abcdefghij.")}, "."))
    inner.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, **dict.fromkeys(("eos_token", "pad_token", "unk_token"), "."))


def test_lm_eval_asks_the_eager_compact_model(compressed):
    """Its rolling log-likelihood of a text of one window is ours: the end-of-text token, then every letter."""
    from lm_eval.api.instance import Instance

    eager = compressed[1].finish("eager")
    before = {name: tensor.clone() for name, tensor in eager.state_dict().items()}
    judge = lm_eval_model(eager, tokenizer(), batch_size=1, max_length=8)
    text = "badcafe"
    [total] = judge.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    ids = [10, *["abcdefghij".index(letter) for letter in text]]
    assert math.exp(-total / len(text)) == pytest.approx(perplexity(eager, ids, window=8, stride=8), rel=1e-4)
    [(score, greedy)] = judge.loglikelihood([Instance("loglikelihood", {}, ("bad", "c"), 0)], disable_tqdm=True)
    with torch.no_grad():
        expected = F.log_softmax(eager.eval()(torch.tensor([[1, 0, 3]])).logits[0, -1], 0)
    assert score == pytest.approx(expected[2].item(), rel=1e-4)
    assert greedy == (int(expected.argmax()) == 2)
    assert all(torch.equal(tensor, eager.state_dict()[name]) for name, tensor in before.items())
    assert perplexity(eager, ids, window=8, stride=8) == pytest.approx(math.exp(-total / len(text)), rel=1e-4)  # it still works itself


def test_lm_eval_is_named_when_it_is_missing(compressed, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(ConfigError, match=r"pip install 'geta\[lm-eval\]'"):
        lm_eval_model(compressed[0], None)


def test_lm_eval_takes_the_eager_product_only(compressed):
    with pytest.raises(BadModelError, match="this is a CompactModel: take the eager product"):
        lm_eval_model(compressed[1].finish(), None)
