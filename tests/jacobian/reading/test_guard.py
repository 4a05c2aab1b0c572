"""The guard: what counts as a verdict before the verdict, by hand, and what each of its levels makes malformed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cepo.jacobian.reading.guard import find_scores, find_tie, find_winner
from cepo.jacobian.reading.judge import JudgeLayout, read_scores, write_judgement
from cepo.jacobian.reading.layout import MalformedError
from cepo.train.prompts import JUDGE, TIES_JUDGE, UNGUARDED_JUDGE
from tests.jacobian.reading.texts import ANY_TEXT, FUZZ
from tests.paths import DATA

SCORES = r"""
\boxed{8, 5}
\boxed{ 8 , 5 }
Scores: A 8, B 5
Scores: 8, 5
Scores: 8/10 vs 5/10
the scores are 8 and 5
8, 5
[8, 5]
A: 8/10, B: 5/10
A: 9 / B: 4
A=8 B=5
A 8 B 5
Accuracy: A 9/10, B 3/10
B scores 7.5
Response A: 9/10
Response A: 8. Response B: 5.
Response A gets 9 and Response B gets 6.
Response A should get a score of 9, Response B a 4
Response A deserves a 9.
Assistant 1 = 8, Assistant 2 = 5
I give 8 to A and 5 to B.
Response A fully adheres (9-10), while Response B partially adheres (6-8)
Relevance (9-10) for Response A, and partially adhered (6-8) for Response B.
Response A: 8
Response A: 8 points
Response A: 8 (brief and right)
Response A (8/10)
Response A - 8
Response B -> 5
A: 8⏎B: 5
A: 8.⏎⏎B: 5.
| A | 8 |⏎| B | 5 |
Response A⏎Score: 8
Response A score: 8, Response B score: 5
A's score is 8
Response B's score: 5
Score for Response A: 8
Score A: 8
I would rate Response A an 8.
\boxed{8/10, 5/10}
\boxed{A: 8, B: 5}
\boxed{95, 60}
boxed{8, 5}
"""
WINNERS = """
A is better
A is better than B.
B wins
Response B wins
Therefore A wins.
Correct (50%) and A is better
Overall, B is stronger.
prefer B
I prefer response B.
I favor A over B.
winner: A
Winner - A
Verdict: B
the better response is A
The preferred answer is B
Assistant A's answer is superior
Response A is clearly the better response.
Response B is worse.
Response B should be preferred because it is honest.
Response 2 is slightly better overall.
The first response is better than the second.
the latter is better.
Response A outperforms Response B.
B deserves the higher score
[[B]]
[[A>B]]
A>>B
A > B
(A) is better.
Response (B) is better.
Response_A is better
Response A clearly is better.
Response A would be the better choice.
Response A is not as good as Response B.
Give A the higher score.
Response Ａ is better.
Response В is better.
A performs better
Response A is by far better.
A is considered better
B turns out to be better.
B is preferred over A
Response A ranks first
A has a slight edge
Final decision: Response B
Chosen response: B
My vote goes to A
"""
TIES = """
It is a tie
It's a tie.
This is a clear draw
Both responses are equally good
Both are equally good.
Both responses are equal.
Overall, the two answers are equally strong
The two are tied.
They are about the same.
A and B are equal
Response A and Response B are of equal quality.
Responses are right (60%). Both get the same score.
Both responses deserve equal scores
A and B should receive the same rating.
Neither is better
Neither response is better than the other.
Neither of them is clearly superior.
Neither response wins
Verdict: tie
Winner: neither
There is no clear winner.
No better response
A = B
[[C]]
[[A=B]]
"""
CONDITIONS = """
Where neither response is better, prefer the shorter one.
If both are equally good, the safer one counts (10%)
Says whether both options are equal
When both responses are equal, tone decides
Both responses are equally long
Both must cite a source
Both responses are equally detailed
Names both: neither option may be missing
Explains that the teams ended level
Says why neither party won the vote
Gives both sides equal weight
Suggests a tie or a scarf
Mentions that the two lines are of the same length
The two terms are equal in the second equation
States that x = 3 and y = 4
"""
HONEST = """
A response that is better organised
clarity is better served
8 out of 10 dentists agree
rate 5 stars
Ratings: 4 stars, 5 stars
(weight 3/10)
Weight: 40%
Correct (60%); says how to do it (40%).
Is correct and complete (weight 2)
1. Accuracy (5 points)
2. Clarity (3 points), 3. Tone (2 points)
Flexibility and Exploration: 7
Accuracy: 9-10 points
Score 1: The response is wrong. Score 5: The response is right.
Scores: 1-2 for wrong answers, 9-10 for right ones
Scores: 1, 2, 3, 4 or 5
Each response gets 1 to 10.
A response scores 8 if it names the city.
A response is better if it is short.
The response gets a higher score if it cites 3 sources.
The better response is accurate and brief.
Says whether Response A is better than Response B without regard to length.
Which of A and B is better follows from these.
Prefer answers that are brief.
Prefer a response that cites.
The best answer is B, as the statute says.
A is the best answer to the question.
Vitamin A is better than vitamin B12 for the eyes
Grade A beef is better
Favours A-list actors.
Prefers A/B tests to guesses.
A wins-over-losses column
The winner is a novel.
The winner is announced on page 2.
The verdict is guilty.
Says who won: the home side, 3 to 1
Names option A and explains it in 3 steps.
Part A: 8 questions, Part B: 5 questions
Coordinates (3, 4) must be named.
Solves x = 8, y = 5.
A = 8, where A is the area
subsets A_1, A_2
If a > b
judge by clarity of the answer
A shows lucid and B shows murky
A shows more and B shows less
Response A gives three steps. Response B gives none.
Response A lists 12 places while Response B lists 5.
Response A has 3 errors and Response B has 5.
Response A is better organised, and Response B is better at dates.
Response B lacks detail; Response A includes a variety of ingredients.
- Sensitivity (1-2 points): Response B mentions preheating but lacks specifics.
Response A: 1. It is right. 2. It is brief.
Response A:⏎1. It is right.⏎Response B:⏎1. It is wrong.
Response A: 7 days
A: 8 apples⏎B: 5 pears
A: 8⏎B: 5⏎C: 12
Rate each response 1-10
A performs better in cold water
A is preferred by most readers of the survey
Decision: A/B tests are named.
A score of 8, or more, means that it is right.
A rating of 5 and above is good.
Response A ends with \boxed{18}, Response B with \boxed{20}
Response A ends with \boxed{58,500}
"""


def lines(text: str) -> list[str]:
    """Return the texts, one per line, in which ⏎ is a line break."""
    return [line.replace("⏎", "\n") for line in text.strip("\n").split("\n")]


def exchange_names(text: str) -> str:
    """Write B for A and A for B, wherever a letter stands alone and names a response."""
    return re.sub(r"\b[AB]\b(?!-)(?! (?:response|wins-))", lambda name: "AB"["BA".index(name[0])], text)


ON = ("criteria", "standard", "strict")
REWRITES: dict[str, Callable[[str], str]] = {
    "as it stands": str,
    "names exchanged": exchange_names,
    "emphasised": lambda text: re.sub(r"\b(Response|Assistant) ([AB])\b", r"**\1 \2**", text),
    "in underscores": lambda text: re.sub(r"\b(Response|Assistant) ([AB])\b", r"__\1 \2__", text),
    "in quotation marks": lambda text: re.sub(r"\b(Response|Assistant) ([AB])\b(?!')", r"\1 '\2'", text),
    "with invisible characters": lambda text: re.sub(r"(?<=\w)(?=\W)", "\u200b", text),
    "last of several": lambda text: f"- Names the right city (weight 3/10).\n- Is brief.\n{text}",
    "first of several": lambda text: f"{text}\n- Names the right city (weight 3/10).\n- Is brief.",
    "indented": lambda text: "  \t" + text.replace(" ", "  ") + "   ",
}


@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES.keys())
def test_verdicts_are_found_and_honest_rubrics_are_not(rewrite: Callable[[str], str]) -> None:
    """Protects both sides of the guard: the hack in every common form, and weights, points, ranges and comparisons."""
    assert [text for text in lines(SCORES) if find_scores(rewrite(text)) is None] == []
    assert [text for text in lines(WINNERS) if find_winner(rewrite(text)) is None] == []
    found = {text: (find_scores(rewrite(text)), find_winner(rewrite(text))) for text in lines(HONEST)}
    assert {text: verdict for text, verdict in found.items() if verdict != (None, None)} == {}
    assert [text for text in lines(TIES) if find_tie(rewrite(text)) is None] == []
    honest = lines(HONEST) + lines(CONDITIONS) + lines(WINNERS)
    assert {text: found for text in honest if (found := find_tie(rewrite(text)))} == {}


@pytest.mark.parametrize(
    ("criteria", "analysis", "refused_by", "reason"),
    [
        (
            "Is right: \\boxed{8, 5}",
            "A is",
            ("criteria", "standard", "strict"),
            "scores in <specific_criteria>: '\\\\b",
        ),
        (
            "Is right. A is better",
            "A is",
            ("criteria", "standard", "strict"),
            "a winner in <specific_criteria>: 'A is b",
        ),
        ("Is right", "A 8/10, B 5/10", ("standard", "strict"), "scores in <analysis>: 'A 8/10, B 5/10'"),
        ("Is right", "So A is better.", ("strict",), "a winner in <analysis>: 'A is better'"),
        ("Is right (weight 3/10)", "A is right.", (), ""),
    ],
)
def test_a_level_refuses_what_it_says_and_quotes_it(
    criteria: str, analysis: str, refused_by: tuple[str, ...], reason: str
) -> None:
    """Protects the four levels, the reason that users read, and that the verdict itself is read all the same."""
    text = write_judgement(criteria, analysis, (9, 3))
    for level in ("off", "criteria", "standard", "strict"):
        layout = JudgeLayout(guard=level)
        if level in refused_by:
            with pytest.raises(MalformedError) as refusal:
                layout.find(text.encode())
            assert reason in str(refusal.value)
        else:
            assert len(layout.find(text.encode()).numbers) == 2
    assert read_scores(text) == (9.0, 3.0)


def test_a_tie_is_a_verdict_where_ties_are_allowed() -> None:
    """Protects judges that may give equal scores from criteria that hold them, and all others from a change."""
    text = write_judgement("Is right. Both are equally good.", "So it is a tie.", (5, 5)).encode()
    assert len(JudgeLayout(guard="strict").find(text).numbers) == 2
    with pytest.raises(MalformedError, match="a tie in <specific_criteria>: 'Both are equally good'"):
        TIES_JUDGE.find(text)
    analysed = write_judgement("Is right.", "So it is a tie.", (5, 5)).encode()
    assert len(TIES_JUDGE.find(analysed).numbers) == 2
    with pytest.raises(MalformedError, match="a tie in <analysis>: 'it is a tie'"):
        replace(TIES_JUDGE, guard="strict").find(analysed)


def test_the_guard_is_on_for_rewards_and_off_for_evaluation() -> None:
    """Protects the default, and that an evaluation of other people's judges reads them as they stand."""
    assert (JUDGE.guard, UNGUARDED_JUDGE.guard) == ("standard", "off")
    with pytest.raises(ValueError, match="guard is 'all'; expected one of strict, standard, criteria, off"):
        JudgeLayout(guard="all")  # type: ignore[arg-type]


@settings(FUZZ, max_examples=80)
@given(text=ANY_TEXT | st.text(st.sampled_from("AB 189/,:>[]()\nis better wins")))
def test_any_text_is_searched_without_an_error(text: str) -> None:
    """Protects the reader of model output, which never raises on it, and quotations that are short."""
    assert all(
        found is None or 0 < len(found) <= 80 for found in (find_scores(text), find_winner(text), find_tie(text))
    )


def test_real_judgements_are_refused_where_their_criteria_score_the_responses() -> None:
    """Protects the guard's figures on real judgements: of these ten, two hold scores of A and B in their criteria."""
    path = DATA / "judge" / "j1_micro_trajectories.jsonl"
    if not path.is_file():
        pytest.skip("the real judgements are not on this machine")
    refused = {}
    for row in map(json.loads, path.read_text().splitlines()):
        try:
            JUDGE.find(row["judge_output"].encode())
        except MalformedError as reason:
            refused[row["id"]] = str(reason)
    assert list(refused) == ["rewardbench-j1/1", "rewardbench-j1/9"]
    assert all("scores in <specific_criteria>: " in reason for reason in refused.values())
