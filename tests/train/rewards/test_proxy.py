"""The proxy reward: hand-computed components, a real encoder, pickling, logging."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from cepo.train.rewards.proxy import ProxyReward, load_encoder, measure_sensitivity

WORDS = ("right", "wrong", "short")


def count_words(text: str) -> np.ndarray:
    """Embed a text as its counts of three words."""
    return np.array([text.split().count(word) for word in WORDS], dtype=float)


def judge_output(criteria: str, analysis: str, scores: str) -> str:
    """Write a judge's output."""
    return (
        f"<specific_criteria>{criteria}</specific_criteria><analysis>{analysis}</analysis>"
        f"<scores>\\boxed{{{scores}}}</scores>"
    )


@pytest.fixture(scope="module")
def encoder_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny random encoder with a tokenizer that reads at most 16 tokens."""
    path = tmp_path_factory.mktemp("encoder")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(("[PAD]", "[UNK]", *WORDS))}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        hidden_dropout_prob=0.5,
    )
    BertModel(config).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("output", "components"),
    [
        # cos((1, 1, 0), (1, 0, 0)) = 1 / sqrt(2); |9 - 3| / 10; two lines of five.
        (judge_output("right\n\n wrong \n", "right", "9, 3"), (2**-0.5, 0.6, 0.4)),
        (judge_output("right\n" * 9, "right right", "1, 10"), (1.0, 0.9, 1.0)),
        (judge_output("right", "wrong", "5, 5"), (0.0, 0.0, 0.2)),
        (judge_output("unknown", "right", "5, 5"), (0.0, 0.0, 0.2)),
        (judge_output(" \n", "right", "5, 4"), (0.0, 0.1, 0.0)),
        (judge_output("right", "right", "1000, 1"), (1.0, 1.0, 0.2)),
        (judge_output("right", "right", "9"), (0.0, 0.0, 0.0)),
        (judge_output("right", "right", "9, 3").replace("</analysis>", ""), (0.0, 0.0, 0.0)),
        (judge_output("right", "right", "9, 3") + "</think>", (1.0, 0.6, 0.2)),
        ("<think>" + judge_output("right", "right", "9, 3"), (0.0, 0.0, 0.0)),
    ],
)
def test_components_are_the_hand_computed_ones(output: str, components: tuple[float, float, float]) -> None:
    """Protects the three components, their ranges, and that malformed output scores 0."""
    sensitivity = measure_sensitivity(output, count_words)
    assert (sensitivity.coherence, sensitivity.score_difference, sensitivity.specificity) == pytest.approx(components)
    assert ProxyReward(count_words)([output]) == [pytest.approx(sum(components) / 3)]


def test_an_opposite_embedding_counts_as_none() -> None:
    """Protects coherence from going below 0."""
    opposite = measure_sensitivity(
        judge_output("right", "wrong", "5, 5"), lambda text: np.array([1.0 if text == "right" else -1.0])
    )
    assert opposite.coherence == 0.0


def test_components_are_logged_by_row_and_by_batch() -> None:
    """Protects what TRL shows: a column for every component and the batch mean."""
    columns: dict[str, list[float]] = {}
    metrics: dict[str, float] = {}
    outputs = [[{"role": "assistant", "content": judge_output("right", "right", "9, 3")}], "malformed"]
    ProxyReward(count_words)(
        outputs, prompts=["", ""], log_extra=columns.__setitem__, log_metric=metrics.__setitem__, label=["A", "B"]
    )
    assert columns == {
        "proxy/coherence": [1.0, 0.0],
        "proxy/score_difference": [0.6, 0.0],
        "proxy/specificity": [0.2, 0.0],
    }
    assert metrics == pytest.approx({"proxy/coherence": 0.5, "proxy/score_difference": 0.3, "proxy/specificity": 0.1})


def test_an_empty_batch_is_no_error() -> None:
    """Protects the means from a division by zero."""
    assert ProxyReward(count_words)([], log_metric=lambda name, value: pytest.fail("no rows, no metric")) == []


def test_a_pickled_reward_gives_the_same_rewards(encoder_path: Path) -> None:
    """Protects pickling: settings travel, a loaded model does not, and a reward has the name that TRL shows."""
    outputs = [judge_output("right short", "wrong", "9, 3")]
    reward = ProxyReward(str(encoder_path))
    unused = pickle.dumps(reward)
    expected = reward(outputs)
    assert pickle.dumps(reward) == unused
    assert pickle.loads(unused)(outputs) == expected
    assert pickle.loads(unused).__name__ == "proxy"
    assert pickle.loads(pickle.dumps(ProxyReward(count_words)))(outputs) == ProxyReward(count_words)(outputs)


def test_nothing_is_loaded_before_the_first_use() -> None:
    """Protects start-up: a name is looked up when the reward is called."""
    reward = ProxyReward("./no-such-encoder")
    with pytest.raises(ValueError, match="encoder is './no-such-encoder', which can't be loaded"):
        reward(["text"])


def test_an_encoder_is_the_mean_of_its_hidden_states(encoder_path: Path) -> None:
    """Protects the pooling against the model itself, without dropout or gradients, and that a long text is cut."""
    encode = load_encoder(str(encoder_path))
    model = BertModel.from_pretrained(encoder_path).eval()
    with torch.no_grad():
        expected_D = model(torch.tensor([[2, 4]])).last_hidden_state[0].mean(0)
    embedding = np.asarray(encode("right short"))
    assert embedding.shape == (8,)
    assert np.allclose(embedding, expected_D.numpy(), atol=1e-6)
    assert np.array_equal(np.asarray(encode("right " * 16)), np.asarray(encode("right " * 400)))


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: np.ones((1, 3)),
        lambda text: np.ones(len(text)),
        lambda text: np.full(3, np.nan),
    ],
)
def test_an_encoder_of_the_wrong_shape_is_named(encode: Callable[[str], np.ndarray]) -> None:
    """Protects against encoders that return batches, token matrices or NaN."""
    with pytest.raises(ValueError, match="encoder returned"):
        ProxyReward(encode)([judge_output("right", "wrong!", "9, 3")])


def test_an_encoder_of_the_wrong_type_is_named() -> None:
    """Protects the rule that bad input is named before work starts."""
    with pytest.raises(ValueError, match="encoder is 3"):
        ProxyReward(3)  # type: ignore[arg-type]


def embed_characters(text: str) -> Any:
    """Embed a text as the histogram of its characters, as a plain list."""
    return [sum(ord(character) % 4 == i for character in text) for i in range(4)]


@settings(derandomize=True, deadline=None, database=None, max_examples=200)
@given(
    criteria=st.text(st.characters(exclude_categories=())),
    analysis=st.text(st.characters(exclude_categories=())),
    scores=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
)
def test_the_reward_stays_in_range(criteria: str, analysis: str, scores: tuple[int, int]) -> None:
    """Protects the range [0, 1] for arbitrary text and scores."""
    output = judge_output(criteria, analysis, f"{scores[0]}, {scores[1]}")
    assert 0.0 <= ProxyReward(embed_characters)([output])[0] <= 1.0
