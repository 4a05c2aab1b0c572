"""Where a thought ends: one definition for judges, reasoners, rewards, spans and evaluations."""

import pytest

from cepo.jacobian.reading.judge import SECTIONS
from cepo.jacobian.reading.layout import MalformedError
from cepo.jacobian.reading.thought import after_thought, find_thought, thought_opened
from tests.jacobian.reading.texts import GOOD


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<|assistant|>\n<think>\n", True),
        ("<|assistant|><think>", True),
        ("<|assistant|>\n<thinking>\n", True),
        ("[/INST][THINK]", True),
        ("Why write <think>?<|end|><|assistant|>\n", False),
        ("<|assistant|>\n<think>\n\n</think>\n\n", False),
        ("Think inside <think> and </think>.", False),
        ("", False),
    ],
)
def test_a_prompt_that_ends_in_the_tag_opened_a_thought(prompt: str, opened: bool) -> None:
    """Protects the one definition of what a template opened: a tag that a question quotes opens nothing."""
    assert thought_opened(prompt) is thought_opened(prompt.encode()) is opened


@pytest.mark.parametrize(
    ("thought", "opened"),
    [
        ("", False),
        ("<think>so</think>", False),
        ("\n <think>\nso\n</think>", False),
        ("<think>one</think>\n<think>two</think>", False),
        ("<thinking>so</thinking>", False),
        ("[THINK]so, inside [THINK] and [/THINK], then\n[/THINK]", False),
        (f"◁think▷{GOOD}◁/think▷", False),
        ("<seed:think>so</seed:think>", True),
        (f"<|START_THINKING|>{GOOD}<|END_THINKING|>", False),
        (f"<|channel|>analysis<|message|>{GOOD}<|end|><|start|>assistant<|channel|>final<|message|>", False),
        ("<thinking>so</think>", False),
        ("<think>\n<think>\nso</think>", False),
        ("<think>so</think>", True),
        ("so</think>", True),
        ("so</thinking>", True),
        ("so</think><think>two</think>", True),
        ("so</think>", False),
        (f"{GOOD} so</think>", True),
        (f"{GOOD} so</think>", False),
        ("<think>I reason inside <think> as told.\n</think>", False),
        ("<think>Inside <think> and </think>, then inside <scores> and </scores>.\n</think>", False),
        ("Inside <think> and </think>, then inside <scores> and </scores>.\n</think>", True),
        ("Inside <think> and </think>, then inside <scores> and </scores>.\n</think>", False),
        ("<think>- Reason inside <think></think>\n- Score inside <scores></scores>\n</think>", False),
        ("<think>I close it with `</think>`, then score.</think>", False),
        ('<think>I close it with "</think>", then score.</think>', False),
        ('<think>I close it with "</think>," then score.</think>', False),
        ("<think>I close it with “</think>”, then score.</think>", False),
        ("我用「</think>」结束。</think>", True),
        ("Je ferme avec « </think> », puis je note.</think>", True),
    ],
)
@pytest.mark.parametrize("rest", [f"\n{GOOD}", GOOD.replace("A is", "B ends with a stray </think>, A does not")])
def test_a_thought_ends_where_its_own_tag_closes_it(thought: str, opened: bool, rest: str) -> None:
    """Protects the end of a thought: tags that it quotes are text, and so is its tag quoted in the judgement."""
    completion = (thought + rest).encode()
    assert after_thought(completion, opened=opened, sections=SECTIONS) == len(thought.encode())


@pytest.mark.parametrize("after", [" trailing </think> text", "\nNote: B left a </think> behind.", "</think>"])
def test_a_closing_tag_behind_a_judgement_closes_no_thought(after: str) -> None:
    """Protects verdicts: a judgement that was not preceded by a thought is not one because it quotes a tag."""
    assert after_thought((GOOD + after).encode(), sections=SECTIONS) == 0


@pytest.mark.parametrize(
    ("completion", "opened"),
    [
        (f"I draft it.\n{GOOD}\nWait, A", True),
        ("", True),
        (f"<think>\n{GOOD}", False),
        (f"<think>one</think><think>{GOOD}", False),
        ("<think>Inside <think> and </think>, then inside <scores> and </scores>. Now", False),
        (f"I close it with “</think>”.\n{GOOD}\nWait, A", True),
        (f"[THINK]I draft it.\n{GOOD}\nWait, A", False),
        (f"◁think▷I draft it.\n{GOOD}\nWait, A", False),
        (f"<|channel|>analysis<|message|>I draft it.\n{GOOD}<|end|>", False),
        (f"<think>我用「</think>」结束。\n{GOOD}\nWait, A", False),
    ],
)
def test_a_thought_that_is_never_closed_leaves_no_answer(completion: str, opened: bool) -> None:
    """Protects cut completions: a draft in a thought is no verdict, whoever opened the thought."""
    with pytest.raises(MalformedError, match="unclosed <think>"):
        find_thought(completion.encode(), opened=opened, sections=SECTIONS)


def test_a_tag_that_is_named_on_the_line_that_ends_the_thought_does_not_keep_it_open() -> None:
    """Protects one-line thoughts: the last closing tag ends the thought, where its line ends too."""
    completion = b"<think>I reason inside <think> as told. Four.</think>\n<answer>4</answer>"
    assert completion[after_thought(completion) :] == b"\n<answer>4</answer>"


def test_the_contents_of_several_thoughts_stand_between_their_tags() -> None:
    """Protects rationales: what is said in a thought, its tags left out."""
    completion = b"<think>one</think>\n<think>two</think>answer"
    thought = find_thought(completion)
    assert [completion[start:end] for start, end in thought.contents] == [b"one", b"two"]
    assert completion[thought.end :] == b"answer"
