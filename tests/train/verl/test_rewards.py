"""The rewards that verl is handed: those of text, and the sum of all of them; none of this needs verl."""

from pathlib import Path

import pytest
import torch
import yaml

from cepo.train.verl.rewards import compute_score, read_rewards

JUDGEMENT = (
    "<specific_criteria>\nc\n</specific_criteria>\n<analysis>\na\n</analysis>\n<scores>\n\\boxed{9, 2}\n</scores>"
)


def recipe(folder: Path, **changes: object) -> str:
    rewards = [{"name": "format"}, {"name": "argmax", "weight": 0.5}, {"name": "causal", "weight": 2.0}]
    told = {"model": "m", "data": {"source": "s"}, "output": "o", "rewards": rewards, **changes}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(told))
    return str(folder / "recipe.yaml")


def test_text_is_rewarded_one_completion_at_a_time(tmp_path: Path) -> None:
    options = {"data_source": "cepo", "extra_info": {"thought_opened": False}, "recipe": recipe(tmp_path)}
    found = compute_score(solution_str=JUDGEMENT, ground_truth="A", **options)  # type: ignore[arg-type]
    assert found == {"score": pytest.approx(0.2 + 0.5), "format_reward": pytest.approx(0.2), "argmax_reward": 1.0}
    found = compute_score(solution_str=JUDGEMENT, ground_truth="B", **options)  # type: ignore[arg-type]
    assert found["argmax_reward"] == 0.0


def test_a_judgement_inside_of_a_thought_that_the_template_opened_is_none(tmp_path: Path) -> None:
    options = {"data_source": "cepo", "extra_info": {"thought_opened": True}, "recipe": recipe(tmp_path)}
    assert compute_score(solution_str=JUDGEMENT, ground_truth="A", **options)["score"] == 0.0  # type: ignore[arg-type]


def test_the_task_of_a_fused_reward_is_read_off_the_text_too(tmp_path: Path) -> None:
    """CE-PO's form: workers fuse it with the links, and in validation it stands alone."""
    rewards = [{"name": "causal", "task": "exact_match", "preset": "paper"}]
    options = {"extra_info": {"thought_opened": False}, "recipe": recipe(tmp_path, kind="reasoning", rewards=rewards)}
    written = "<think>1 + 1</think><answer>2</answer>"
    found = compute_score(data_source="cepo", solution_str=written, ground_truth="2", **options)  # type: ignore[arg-type]
    assert found == {"score": 1.0, "causal/task": 1.0}


def test_rewards_are_added_by_weight(tmp_path: Path) -> None:
    rewards_BN = torch.tensor([[0.2, 1.0, 0.5], [0.0, 0.0, 0.0]])
    total_B = read_rewards(recipe(tmp_path)).total(rewards_BN, ["p", "p"])
    torch.testing.assert_close(total_B, torch.tensor([0.2 + 0.5 + 1.0, 0.0]))


def test_standardised_rewards_weigh_alike_whatever_their_size(tmp_path: Path) -> None:
    """As TRL's normalize_then_sum: within each prompt's completions, and then the sum over the batch.

    The third reward is a thousandth of the others; in the second prompt nothing differs, so that nothing is learned.
    """
    path = recipe(tmp_path, grpo={"multi_objective_aggregation": "normalize_then_sum"})
    rewards_BN = torch.tensor([[0.0, 1.0, 0.001], [0.0, 0.0, 0.002], [0.3, 1.0, 0.0], [0.3, 1.0, 0.0]])
    total_B = read_rewards(path).total(rewards_BN, ["p", "p", "q", "q"])
    z = 0.5 / (0.5**0.5 + 1e-4)  # of two values, half their distance by their deviation
    small = 0.0005 / (0.0005 * 2**0.5 + 1e-4)
    wanted_B = torch.tensor([0.5 * z - 2.0 * small, 2.0 * small - 0.5 * z, 0.0, 0.0])
    torch.testing.assert_close(total_B, wanted_B / (wanted_B.std() + 1e-4), rtol=1e-5, atol=1e-6)
