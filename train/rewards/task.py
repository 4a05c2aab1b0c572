r"""The task rewards: whether the output is well formed, and whether the verdict or answer is right.

Plain functions with TRL's signature, `(completions, **columns) -> list[float]`. Malformed model output never raises; it
gets the reward 0. Columns of the data set are checked: an invalid label raises ValueError.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from cepo.jacobian.reading.answer import read_number
from cepo.jacobian.reading.judge import SECTIONS, after_judges_thought, read_scores
from cepo.jacobian.reading.reasoner import extract_answer, reference_answer
from cepo.jacobian.reading.same_answer import in_ascii_digits, same_text
from cepo.jacobian.reading.verdict import STRICT, Verdicts
from cepo.train.rewards.completions import Completion, check_column, read_completions
from cepo.train.rows import TIE, number_text

_SCORE_RANGE = 9  # the judge is asked for scores from 1 to 10
# Final answers are short. Longer ones are compared as text only, since the math parser takes seconds on noise.
_MATH_LENGTH_LIMIT = 300
_MATH_TIMEOUT_S = 2


def format_reward(completions: Sequence[Completion], *, verdicts: Verdicts = STRICT, **columns: Any) -> list[float]:
    r"""Reward the judge's format.

    The reward is the sum, divided by 5, of 1/8 for each of the six tags that occur after the thought and 2/8 for a pair
    of scores that `read_scores` can read.

    Args:
        completions: Strings or message lists.
        verdicts: Which written forms of a verdict count, see `JudgeLayout`.
        **columns: Other columns; `prompts` and `thought_opened` tell where thoughts end, see `read_completions`.

    Returns:
        One reward per completion, in [0, 0.2].

    Source:
        Haize Labs, j1-micro (2025), format reward.
    """
    tags = [f"<{slash}{name}>" for name in SECTIONS for slash in ("", "/")]
    rewards = []
    for text, opened in read_completions(completions, **columns):
        judgement = after_judges_thought(text, thought_opened=opened)
        pair = read_scores(text, thought_opened=opened, verdicts=verdicts)
        rewards.append((sum(tag in judgement for tag in tags) / 8 + (pair is not None) * 2 / 8) / 5)
    return rewards


def argmax_reward(
    completions: Sequence[Completion],
    label: Sequence[str] | None = None,
    *,
    verdicts: Verdicts = STRICT,
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float]:
    """Reward the judge for scoring the better response strictly higher, and on ties for equal scores.

    On a tie, equal scores a = b earn 1, and others max(0, 1 - |a - b| / 9) / 2. A near miss thus earns less than half,
    so that a judge gains nothing by giving every pair nearly equal scores.

    Args:
        completions: Strings or message lists.
        label: The better response of each row, "A" or "B", or "tie": a column that the data set must have.
        verdicts, **columns: As for `format_reward`.
        log_metric: TRL's. It gets the share of completions with equal scores, among preferences as
            `argmax/ties_on_preferences` and among ties as `argmax/ties_on_ties`.

    Returns:
        One reward per completion, in [0, 1]. For "A" and "B" 1.0 if the label has the higher score, else 0.0, also for
        equal scores; 0.0 without scores.

    Raises:
        ValueError: If there is no label, one is none of these, or their number is not that of the completions.

    Source:
        Haize Labs, j1-micro (2025), argmax reward; the rule for ties is ours.
    """
    labels = check_column("label", label, len(completions))
    for value in labels:
        if value not in ("A", "B", TIE):
            raise ValueError(f"label is {value!r}; expected 'A', 'B' or {TIE!r}")
    pairs = [
        read_scores(text, thought_opened=opened, verdicts=verdicts)
        for text, opened in read_completions(completions, **columns)
    ]
    if log_metric is not None:
        for kind, wanted in (("preferences", False), ("ties", True)):
            equal = [
                pair is not None and pair[0] == pair[1]
                for pair, value in zip(pairs, labels, strict=True)
                if (value == TIE) == wanted
            ]
            if equal:
                log_metric(f"argmax/ties_on_{kind}", sum(equal) / len(equal))
    return [_verdict_reward(pair, value) for pair, value in zip(pairs, labels, strict=True)]


def exact_match(
    completions: Sequence[Completion], answer: Sequence[str | float] | None = None, **columns: Any
) -> list[float]:
    """Reward an answer that equals the reference as text.

    What does not change an answer is ignored, such as case, see `normal_form`.

    Args:
        completions: Strings or message lists; `extract_answer` finds the answer.
        answer: The reference of each row, see `reference_answer`: a column that the data set must have.
        **columns: as for `format_reward`.

    Returns:
        One reward per completion: 1.0 where they agree, else 0.0.

    Raises:
        ValueError: If a reference is empty or missing, or their number is not that of the completions.
    """
    pairs = _answers_and_references(completions, answer, columns)
    return [float(same_text(candidate, reference)) for candidate, reference in pairs]


def math_verify_reward(
    completions: Sequence[Completion], answer: Sequence[str | float] | None = None, **columns: Any
) -> list[float]:
    r"""Reward an answer that is mathematically equal to the reference, such as 0.5 for \frac{1}{2}.

    Equal text is enough; otherwise the math-verify library compares both sides as LaTeX. It is made for mathematical
    answers and reads a word as a product of letters, so a unit in words ("18 jars") is removed from one side if the
    other is a number. Answers of more than 300 characters are compared only as text.
    Answers that the library can't parse or compare within 2 seconds get 0. The time limit works only in the main thread
    of a POSIX system; elsewhere there is none.

    Args:
        completions: Strings or message lists; `extract_answer` finds the answer.
        answer: The reference of each row, see `reference_answer`: a column that the data set must have.
        **columns: as for `format_reward`.

    Returns:
        One reward per completion: 1.0 where they agree, else 0.0.

    Raises:
        ValueError: If a reference is empty or missing, or their number is not that of the completions.

    Source:
        Hugging Face, Math-Verify (2025).
    """
    pairs = _answers_and_references(completions, answer, columns)
    return [
        float(same_text(candidate, reference) or _same_mathematics(candidate, reference))
        for candidate, reference in pairs
    ]


def bertscore_reward(
    completions: Sequence[Completion], answer: Sequence[str | float] | None = None, **columns: Any
) -> list[float]:
    """Reward an answer by its BERTScore F1 against the reference, for answers in free text.

    The English model of the bert-score library is loaded on first use and cached.

    Args:
        completions: Strings or message lists; `extract_answer` finds the answer.
        answer: The reference of each row, see `reference_answer`: a column that the data set must have.
        **columns: as for `format_reward`.

    Returns:
        One reward per completion, in [0, 1]; 0.0 for an empty answer.

    Raises:
        ImportError: If the optional bert-score library is not installed.
        ValueError: If a reference is empty or missing, or their number is not that of the completions.

    Source:
        Zhang et al., BERTScore: evaluating text generation with BERT (2020), the F of section 3, without idf weights.
    """
    pairs = _answers_and_references(completions, answer, columns)
    rewards = [0.0] * len(pairs)
    written = [row for row, (candidate, _) in enumerate(pairs) if candidate]
    scorer = _load_bert_scorer()
    if written:
        _, _, f1_N = scorer.score([pairs[row][0] for row in written], [pairs[row][1] for row in written])
        for row, f1 in zip(written, f1_N.tolist(), strict=True):
            rewards[row] = min(max(f1, 0.0), 1.0)
    return rewards


def _verdict_reward(scores: tuple[float, float] | None, label: str) -> float:
    if scores is None:
        return 0.0
    lead = scores[0] - scores[1]
    if label == TIE:
        return 1.0 if lead == 0 else max(0.0, 1.0 - abs(lead) / _SCORE_RANGE) / 2
    return float(lead > 0 if label == "A" else lead < 0)


def _answers_and_references(
    completions: Sequence[Completion], answer: Sequence[str | float] | None, columns: Mapping[str, Any]
) -> list[tuple[str, str]]:
    references = []
    for value in check_column("answer", answer, len(completions)):
        reference = reference_answer(value if isinstance(value, str) else number_text(value) or "")
        if not reference:
            raise ValueError(f"answer is {value!r}; expected a text or a number")
        references.append(reference)
    candidates = [
        extract_answer(text, thought_opened=opened) for text, opened in read_completions(completions, **columns)
    ]
    return list(zip(candidates, references, strict=True))


def _same_mathematics(candidate: str, reference: str) -> bool:
    if not candidate or max(len(candidate), len(reference)) > _MATH_LENGTH_LIMIT:
        return False
    sides = [in_ascii_digits(side).strip("$ ").rstrip(".,;:") for side in (reference, candidate)]
    numbers = [read_number(side) for side in sides]
    if None not in numbers and any(number == side for number, side in zip(numbers, sides, strict=True)):
        sides = [str(number) for number in numbers]
    # The library's time limit uses SIGALRM, which only a main thread may set. It turns its exceptions into "not equal".
    can_keep_time = os.name == "posix" and threading.current_thread() is threading.main_thread()
    timeout_s = _MATH_TIMEOUT_S if can_keep_time else None
    # LaTeX only: the extractor of plain numbers would take a 2 in an unparsable formula for the whole answer.
    readings = [
        parse(f"${side.strip('$ ')}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=timeout_s)
        for side in sides
    ]
    return bool(verify(*readings, timeout_seconds=timeout_s))


@functools.cache
def _load_bert_scorer() -> Any:
    try:
        from bert_score import BERTScorer
    except ImportError as error:
        raise ImportError("bertscore_reward needs the bert-score library: pip install 'cepo[bertscore]'") from error
    return BERTScorer(lang="en")
