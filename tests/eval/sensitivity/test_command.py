"""Protects `cepo eval sensitivity`: the attribute's tokens, shares by hand, leak beside edit distance."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cepo.counterfactual.text.mechanical import shows
from cepo.eval.judges.reward import RewardSettings
from cepo.eval.sensitivity import command as sensitivity_module
from cepo.eval.sensitivity.command import SensitivityJob, run_sensitivity, summarise
from cepo.eval.sensitivity.edits import CLEAN, UNCHECKED, Edit, known_edits, read_edits
from cepo.eval.sensitivity.measures import measure_sensitivity
from cepo.jacobian.reading.token_bytes import TokenBytes
from cepo.jacobian.reward_model import read_last_token
from cepo.jacobian.scalar import reward_jacobian
from cepo.train.pair_encoding import PairEncoder, Shown
from cepo.train.reward_scores import RewardModel
from cepo.train.reward_testbed import WORDS, build_reward_model
from tests.eval.judges.fake_judge import run_cepo
from tests.eval.judges.fake_reward_model import write_reward_model

PROMPT = "Query: help with this exam"
PAIR = {"prompt": PROMPT, "chosen": "Response: correct rude so", "rejected": "Response: wrong rude so"}


@pytest.fixture(scope="module")
def model() -> tuple[RewardModel, TokenBytes]:
    untrained, tokenizer = build_reward_model("bradley-terry", seed=0)
    encoder = PairEncoder(tokenizer, Shown(), max_length=64)
    return RewardModel(read_last_token(untrained, None), encoder), TokenBytes(tokenizer)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_with_an_attribute_are_edits_and_the_others_say_why_not(tmp_path: Path) -> None:
    edit = {**PAIR, "attribute": "accuracy"}
    rows: list[dict[str, Any]] = [
        {**edit, "id": 7, "kind": "degrade", "attribute_words": ["correct", "wrong"], "direction": "down"},
        {**edit, "attribute_words": "correct"},
        {**PAIR, "kind": "original"},
        {**edit, "kept": False, "reason": "other change: tone"},
        {**edit, "attribute_words": [3]},
        {**edit, "attribute_words": "correct"},
        {**edit, "tie": True},
        {**edit, "kind": "relevance", "direction": None},
    ]
    edits, left_out = read_edits(str(write(tmp_path / "rows.jsonl", rows)))
    texts = PROMPT, PAIR["chosen"], PAIR["rejected"]
    assert edits == [
        Edit("7", *texts, "degrade", "accuracy", ("correct", "wrong"), place="line 1"),
        Edit("", *texts, "edit", "accuracy", ("correct",), place="line 2"),
    ]
    assert [edit.name for edit in edits] == ["7", "line 2"]
    moved, _ = read_edits(str(write(tmp_path / "moved.jsonl", rows[1:2])))
    assert (moved[0].key, moved[0].name) == (edits[1].key, "line 1")
    assert left_out == [
        (3, "has no attribute, or no direction: neither response is an edit of the other"),
        (4, "not kept: other change: tone"),
        (5, "column 'attribute_words' holds [3]; expected a text, or a list of texts"),
        (7, "is a tie: neither response is better"),
        (8, "has no attribute, or no direction: neither response is an edit of the other"),
    ]


def test_the_testbeds_unchecked_edits_change_more_than_the_cause() -> None:
    edits = known_edits(20, seed=3)
    assert edits == known_edits(20, seed=3) != known_edits(20, seed=4)
    assert [edit.kind for edit in edits[:2]] == [CLEAN, UNCHECKED]
    for clean, unchecked in zip(edits[::2], edits[1::2], strict=True):
        pairs = list(zip(clean.chosen.split(), clean.rejected.split(), strict=True))
        assert [pair for pair in pairs if pair[0] != pair[1]] == [WORDS[clean.attribute]]
        assert unchecked.others is not None
        assert unchecked.others != unchecked.chosen == clean.chosen
        assert shows(unchecked.others, clean.attribute, WORDS)
        assert unchecked.rejected == unchecked.others.replace(*WORDS[clean.attribute])


def test_shares_are_those_of_the_gradient_and_a_clean_edit_has_no_leak(model: tuple[RewardModel, TokenBytes]) -> None:
    scored, token_bytes = model
    edit = Edit("", *PAIR.values(), "degrade", "accuracy", ("correct", "wrong"))
    found = measure_sensitivity(edit, *model)
    ids, response, own = scored.encoder.encode_response(PROMPT, edit.chosen, edit.words)
    assert [token_bytes.of((ids[place],))[0] for place in own] == [b" correct"]
    _, jac_SD = reward_jacobian(scored.model, ids, response)
    energy_S = jac_SD.double().square().sum(-1)
    assert found["energy_share"] == pytest.approx(float(energy_S[response.index(own[0])] / energy_S.sum()), rel=1e-5)
    assert found["token_share"] == pytest.approx(1 / len(response))
    difference = scored.differences([PROMPT], [edit.chosen], [edit.rejected]).values_N[0]
    assert found["difference"] == pytest.approx(difference, abs=1e-5)
    assert sum(found["attribution"]) == pytest.approx(difference, abs=0.01)
    assert (found["leak"], found["edit_distance"], found["exact_share"]) == (0.0, 1, None)
    assert b" correct".decode() in found["tokens"]
    unnamed = measure_sensitivity(Edit("", *PAIR.values(), "degrade", "accuracy"), *model)
    assert (unnamed["leak"], unnamed["energy_share"]) == (None, pytest.approx(found["energy_share"])), "by what changed"


def test_an_edit_without_its_words_or_a_gradient_gives_no_number(model: tuple[RewardModel, TokenBytes]) -> None:
    """A leak of 1 for words that are in neither response, and NaN for a share of nothing, went into the means."""
    with pytest.raises(ValueError, match="neither response has 'Correct' or 'purple' as a whole word"):
        measure_sensitivity(Edit("", *PAIR.values(), "degrade", "accuracy", ("Correct", "purple")), *model)
    edit = Edit("", *PAIR.values(), "degrade", "accuracy", ("correct", "wrong"))
    untrained, tokenizer = build_reward_model("bradley-terry", seed=0)
    constant = RewardModel(read_last_token(untrained, None), PairEncoder(tokenizer, Shown(), max_length=64))
    torch.nn.init.zeros_(untrained.score.weight)
    found = measure_sensitivity(edit, constant, model[1])
    assert (found["energy_share"], found["leak"], found["difference"]) == (None, None, 0.0)
    untrained.score.register_full_backward_hook(lambda module, gradients, _: (gradients[0] * math.nan,))
    with pytest.raises(ValueError, match="not finite"):
        measure_sensitivity(edit, constant, model[1])


def test_leak_is_what_the_reward_changes_by_elsewhere(model: tuple[RewardModel, TokenBytes]) -> None:
    """The attribute and one word after it: two exchanges, whose effects are rewards of four texts."""
    scored, _ = model
    rejected = "Response: wrong indeed rude so"
    edit = Edit("", PROMPT, PAIR["chosen"], rejected, UNCHECKED, "accuracy", ("correct", "wrong"), PAIR["chosen"])
    found = measure_sensitivity(edit, *model)
    texts = [PAIR["chosen"], rejected, PAIR["rejected"], "Response: correct indeed rude so"]
    own, both, cause, other = scored.rewards([PROMPT] * 4, texts).values_N
    cause_effect = ((own - cause) + (other - both)) / 2
    other_effect = ((own - other) + (cause - both)) / 2
    expected = abs(other_effect) / (abs(cause_effect) + abs(other_effect))
    assert found["leak"] == pytest.approx(expected, abs=1e-4)
    assert (found["edit_distance"], found["nodes"]) == (2, 0)
    assert found["error_of_sum"] < 1e-5
    assert found["exact_share"] == 0.0, "nothing but the attribute was changed, as `others` says here"
    edit = Edit("", PROMPT, PAIR["chosen"], rejected, UNCHECKED, "accuracy", ("correct", "wrong"), texts[3])
    share = abs(own - other) / (abs(own - other) + abs(other - both))
    assert measure_sensitivity(edit, *model)["exact_share"] == pytest.approx(share, abs=1e-4)


def test_leak_and_edit_distance_are_compared_by_hand() -> None:
    """Leak orders the unchecked edits as the truth does and one clean edit wrongly; distance has ties."""
    rows: list[tuple[str, float, int, float | None]] = [(CLEAN, 0.0, 1, None), (CLEAN, 0.3, 1, None)]
    rows += [
        (UNCHECKED, leak, distance, share) for leak, distance, share in ((0.2, 3, 0.1), (0.5, 2, 0.4), (0.9, 2, 0.8))
    ]
    edits = [Edit(str(place), f"p{place}", "a", "b", kind, "x", ("y",)) for place, (kind, *_) in enumerate(rows)]
    names = ("difference", "right", "energy_share", "token_share", "error_of_sum")
    found = summarise(
        edits,
        [
            {**dict.fromkeys(names, 0.5), "leak": leak, "edit_distance": distance, "exact_share": share, "error": None}
            for _, leak, distance, share in rows
        ],
    )
    at = {name: estimate.value for name, estimate in found.comparison.items()}
    assert at["leak", "auc"] == pytest.approx(5 / 6)
    assert at["edit_distance", "auc"] == 1.0
    assert at["leak", "rank_correlation"] == pytest.approx(1.0)
    assert at["edit_distance", "rank_correlation"] == pytest.approx(-math.sqrt(3) / 2)
    assert found.means["all", "leak"].value == pytest.approx(1.9 / 5)
    assert found.means[UNCHECKED, "exact_share"].count == 3


def test_a_killed_run_goes_on_and_every_edit_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_reward_model(tmp_path / "model")
    edit = {**PAIR, "attribute": "accuracy", "attribute_words": ["correct", "wrong"]}
    rows = [
        edit,
        {**edit, "prompt": "Query: about my exam today"},
        {**edit, "chosen": "Response:" + " correct" * 600, "id": "long"},
        {**edit, "chosen": "Response: unheard", "rejected": "Response: unseen"},
        PAIR,
    ]
    job = SensitivityJob(RewardSettings(str(folder)), str(write(tmp_path / "rows.jsonl", rows)), tmp_path / "out")
    measured: list[str] = []

    def measure(one: Edit, *given: Any) -> Any:
        if len(measured) == 1 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise KeyboardInterrupt
        measured.append(one.prompt)
        return measure_sensitivity(one, *given)

    monkeypatch.setattr(sensitivity_module, "measure_sensitivity", measure)
    with pytest.raises(KeyboardInterrupt):
        run_sensitivity(job)
    summary = run_sensitivity(job)
    assert measured.count(PROMPT) == 3, "the first, and the two that cannot be measured"
    assert (summary.edits, len(summary.left_out)) == (2, 1)
    reasons = sorted(reason.partition(":")[0] for reason in summary.failed)
    assert reasons == ["equal after encoding", "too long"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert {line["metric"] for line in map(json.loads, (tmp_path / "out" / "summary.jsonl").open())} >= {"energy_share"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "gradient of the reward" in page
    assert "the exact effect is" in page
    assert "nats</strong>" not in page, "a reward has no nats"
    write(tmp_path / "rows.jsonl", rows[1:])
    with pytest.raises(ValueError, match="1 of the 2 records in rows.jsonl belong to rows that this run does not read"):
        run_sensitivity(job)


def test_the_command_compares_on_the_testbed_and_refuses_a_pairwise_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = write_reward_model(tmp_path / "model"), str(tmp_path / "out")
    common = ("eval", "sensitivity", "--data", "testbed", "--limit", "4", "--threads", "1", "--output", output)
    assert run_cepo(monkeypatch, *common, "--reward-model", str(folder)) == 0
    said = capsys.readouterr().out
    assert "Leak compared with edit distance" in said
    assert "energy at the" in said
    pairwise = write_reward_model(tmp_path / "pairwise", "pairwise")
    assert run_cepo(monkeypatch, *common, "--reward-model", str(pairwise)) == 2
    assert "which compares two responses" in capsys.readouterr().err
    assert run_cepo(monkeypatch, *common, "--reward-model", str(folder), "--dtype", "float64") == 2
    assert "dtype was" in capsys.readouterr().err
