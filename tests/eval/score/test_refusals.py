"""Protects what `cepo score` says of broken lines, malformed output, prompts that do not fit and bad arguments."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from cepo.cli.app import main
from cepo.eval.score import command as score_module
from cepo.eval.score import scorer as scorer_module
from cepo.fusion.config import RewardConfig
from tests.eval.score.rollouts import ALONE, ITEMS, Cepo, gold_rows
from tests.jsonl import read_jsonl, write_jsonl


def test_broken_lines_are_named_and_the_other_rows_scored(judge: Path, tmp_path: Path, cepo: Cepo) -> None:
    good = gold_rows()
    rows = [good[0], '{"prompt": "cut', good[1], {"prompt": "no completion"}, {**good[2], "task_reward": 7}, good[3]]
    out = tmp_path / "out.jsonl"
    code, message = cepo("--model", judge, "--input", write_jsonl(tmp_path / "in", rows), "--output", out)
    assert code == 2
    assert "line 2 is broken" in message
    assert "line 4: lacks the column completion: it holds no known form (prompt); most other rows hold" in message
    assert "line 5: column 'task_reward' holds 7; expected a number in [0, 1]" in message
    records = read_jsonl(out)
    assert [record["malformed"] is None for record in records] == [True, False, True, False, False, True]


def test_broken_lines_are_not_counted_as_malformed_output(judge: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in", [gold_rows()[0], {"prompt": "x", "completion": "no tags"}, "{", {"x": 1}])
    config = RewardConfig(links={"X->Y": 1.0}, score="influence")
    job = score_module.ScoreJob(model=str(judge), input=source, output=tmp_path / "out", config=config)
    done = score_module.score_file(job)
    assert (done.rows, done.malformed) == (4, 1)
    assert [reason.split(":")[0] for reason in done.broken] == ["line 3 is broken", "line 4"]
    assert done.reasons == {"empty completion": 1}  # the testbed has no such words
    rewards = [record["reward"] for record in read_jsonl(tmp_path / "out")[:2]]
    assert rewards[1] == 0.0 < done.means["S X->Y (well-formed)"]
    assert done.means["reward (all completions)"] == pytest.approx(rewards[0] / 2)  # malformed output earns 0


def test_malformed_rows_are_scored_zero_with_their_reason(judge: Path, tmp_path: Path, cepo: Cepo) -> None:
    item = ITEMS[0]
    wild = [
        "",
        item.completion[:-30],
        item.completion * 2,
        "\ud800" + item.completion,
        item.completion.replace("<analysis>", ""),
        "<script>alert(1)</script>\0 ‮ no tags <|end|>",
        "\\boxed{" + "9" * 10_000 + ", 1}",
    ]
    rows: list[Any] = [{"prompt": item.prompt, "completion": text} for text in wild]
    rows.append({"prompt_ids": [10], "completion_ids": [1, 10**6]})
    out, page = tmp_path / "out.jsonl", tmp_path / "o.html"
    source = write_jsonl(tmp_path / "in", rows)
    code, _ = cepo("--model", judge, "--input", source, "--output", out, *ALONE, "--html", page)
    assert code == 0
    records = read_jsonl(out)
    assert [record["row"] for record in records] == list(range(len(rows)))
    assert all(record["reward"] == 0.0 and record["malformed"] for record in records if record["row"] != 3)
    assert [record["id"] for record in records] == [f"line {number}" for number in range(1, len(rows) + 1)]
    assert "<script>alert" not in page.read_text()
    assert "<summary><bdi>line 2</bdi>" in page.read_text()


def test_a_prompt_that_the_model_cannot_take_is_not_scored_and_no_fault_of_its_completion(
    judge: Path, tmp_path: Path, cepo: Cepo
) -> None:
    """A reward of 0 would blame the completion, and lower the mean; one that alone is too long has itself to blame."""
    long = [5] * 10_000
    rows = [
        *gold_rows()[:2],
        {"prompt": ITEMS[2].prompt + " lucid" * 10_000, "completion": ITEMS[2].completion},
        {"prompt_ids": [10**6], "completion_ids": [1, 2]},
        {"prompt_ids": [5], "completion_ids": long},
    ]
    source, out, page = write_jsonl(tmp_path / "in", rows), tmp_path / "out.jsonl", tmp_path / "o.html"
    code, message = cepo("--model", judge, "--input", source, "--output", out, "--html", page)
    assert code == 2
    assert "has 2 rows that could not be used: line 3: the model cannot take its prompt: too long: 10" in message
    assert "line 4: the model cannot take its prompt: token id 1000000 is outside" in message
    records = read_jsonl(out)
    assert [record["broken"] for record in records] == [False, False, True, True, False]
    assert [record["reward"] is None for record in records] == [False, False, True, True, False]
    assert records[4]["malformed"].startswith("too long: 10001 tokens")
    assert "not scored" in page.read_text()
    job = score_module.ScoreJob(model=str(judge), input=source, output=out)  # resumes: the same summary
    done = score_module.score_file(job)
    assert (done.malformed, len(done.broken)) == (1, 2)
    wanted = sum(records[row]["reward"] for row in (0, 1, 4)) / 3
    assert done.means["reward (all completions)"] == pytest.approx(wanted)


def test_donors_of_the_only_prompt_are_refused_as_the_rows_themselves_are(
    judge: Path, tmp_path: Path, cepo: Cepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them can serve: every S would be 0, against nothing."""
    monkeypatch.setattr(scorer_module, "load_weights", lambda *_, **__: pytest.fail("a model was loaded first"))
    one, out = write_jsonl(tmp_path / "one", gold_rows()[:1]), tmp_path / "out"
    code, message = cepo("--model", judge, "--input", one, "--donors", one, "--output", out)
    assert code == 2
    assert f"--donors '{one}' has no donors" in message
    assert "of 1 prompt, and a donor is the content of another prompt's rollout" in message
    pairs = write_jsonl(tmp_path / "pairs", [{"prompt": "x", "chosen": "a", "rejected": "b"}])
    code, message = cepo("--model", judge, "--input", one, "--donors", pairs, "--output", tmp_path / "other")
    assert code == 2
    assert f"--donors '{pairs}' lacks the column judge_output" in message


def test_judged_pairs_are_refused_as_reasoning(
    judge: Path, tmp_path: Path, cepo: Cepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge's instructions would count as the words of the prompt."""
    monkeypatch.setattr(scorer_module, "load_weights", lambda *_, **__: pytest.fail("a model was loaded first"))
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "judge_output": ITEMS[0].completion}
    source, out = write_jsonl(tmp_path / "in", [pair]), tmp_path / "out"
    code, message = cepo("--model", judge, "--input", source, "--output", out, "--kind", "reasoning")
    assert code == 2
    assert "line 1: holds a judged pair (prompt, chosen, rejected, judge_output), which only --kind judge" in message
    assert not list(tmp_path.glob("out*"))  # so that the right --kind may follow


def test_where_no_row_is_well_formed_all_are_scored_zero_and_the_reasons_shown(
    judge: Path, tmp_path: Path, cepo: Cepo, capsys: pytest.CaptureFixture[str]
) -> None:
    """Free text is output like any other: there is no span, so no span lacks a donor."""
    rows = [{"prompt": ITEMS[row].prompt, "completion": ITEMS[row].analysis} for row in range(2)]
    out = tmp_path / "out.jsonl"
    job = score_module.ScoreJob(model=str(judge), input=write_jsonl(tmp_path / "in", rows), output=out)
    done = score_module.score_file(job)
    assert (done.rows, done.malformed, sum(done.reasons.values())) == (2, 2, 2)
    assert [record["reward"] for record in read_jsonl(out)] == [0.0, 0.0]
    sys.argv = ["cepo", "score", "--model", str(judge), "--input", str(job.input), "--output", str(out)]
    with pytest.raises(SystemExit) as end:
        main()
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert 0 < shown.index("malformed: ") < shown.index("no completion is well-formed")


def test_rows_of_one_prompt_are_told_why_before_weights_are_loaded(
    judge: Path, tmp_path: Path, cepo: Cepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer_module, "load_weights", lambda *_, **__: pytest.fail("a model was loaded first"))
    rows = [gold_rows()[0], {"prompt": ITEMS[1].prompt, "completion": ITEMS[1].analysis}]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    code, message = cepo("--model", judge, "--input", source, "--output", tmp_path / "out.jsonl")
    assert code == 2
    assert message.index("1 of 2 rows are malformed") < message.index("of 1 prompt,")


def test_a_model_without_chat_template_is_told_what_rows_it_takes(judge: Path, tmp_path: Path, cepo: Cepo) -> None:
    """No advice leads to another refusal: --raw for text, and rows of text for what only a template can write."""
    plain = tmp_path / "plain"
    shutil.copytree(judge, plain)
    (plain / "chat_template.jinja").unlink()
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "judge_output": "c"}
    for row, raw, advice in (
        (pair, (), "rows of prompt and completion as text, and --raw"),
        (pair, ("--raw",), "rows of prompt and completion as text, and --raw"),
        ({"prompt": "p", "completion": "c"}, (), "score with --raw"),
    ):
        source = write_jsonl(tmp_path / "in.jsonl", [row])
        code, message = cepo("--model", plain, "--input", source, "--output", tmp_path / "out.jsonl", *raw)
        assert code == 2
        assert advice in message


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt_ids": "abc", "completion_ids": [1]}, "column 'prompt_ids' holds 'abc'; expected a list of integers"),
        ({"prompt_ids": [1], "completion_ids": [True]}, "column 'completion_ids' holds '[True]'; expected a list"),
        ({"prompt_ids": [], "completion_ids": [1]}, "the prompt has no tokens"),
        ({"prompt": 5, "completion": "x"}, "column 'prompt' holds a number, not text"),
        ({"prompt": "x", "completion": None}, "lacks the column completion"),
        ({"prompt": [{"role": "user"}], "completion": "x"}, "column 'prompt' holds nothing, not text"),
        ({"prompt": "x", "completion": []}, "column 'completion' is a list, but not one of messages"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "judge_output": None}, "lacks the column judge_output"),
        (
            {"prompt": "x", "chosen": 7, "rejected": "b", "judge_output": "z"},
            "column 'chosen' holds a number, not text",
        ),
    ],
)
def test_values_of_a_wrong_type_are_broken_lines_not_malformed_output(
    judge: Path, tmp_path: Path, cepo: Cepo, row: dict[str, Any], complaint: str
) -> None:
    """Protects the count of malformed output, which is the model's: a mistake in the data is the data's."""
    out = tmp_path / "out.jsonl"
    source = write_jsonl(tmp_path / "in", [{**row, "id": "its own"}, gold_rows()[0]])
    code, message = cepo("--model", judge, "--input", source, "--output", out, *ALONE)
    assert code == 2
    assert f"line 1: {complaint}" in message
    broken, scored = read_jsonl(out)
    assert complaint in broken["malformed"]
    assert (broken["broken"], broken["id"], scored["broken"]) == (True, "its own", False)
    assert scored["malformed"] is None


@pytest.mark.parametrize("more", [ALONE, ()])
def test_rows_that_the_chat_template_refuses_are_broken_not_malformed_output(
    judge: Path, tmp_path: Path, cepo: Cepo, more: tuple[str, ...]
) -> None:
    """Gemma has no system message: the data is at fault, and the exit code says so, after a resumed run too."""
    model, out = tmp_path / "model", tmp_path / "out.jsonl"
    shutil.copytree(judge, model)
    template = model / "chat_template.jinja"
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    strict = [{"role": "system", "content": "Be strict."}, {"role": "user", "content": ITEMS[0].prompt}]
    rows = [{"id": number, "prompt": strict, "completion": ITEMS[0].completion} for number in range(3)]
    source = write_jsonl(tmp_path / "in", rows)
    for _ in range(2):
        code, message = cepo("--model", model, "--input", source, "--output", out, *more)
        assert code == 2
        assert "line 1: the chat template refuses the messages: System role not supported" in message
    if more:
        records = read_jsonl(out)
        assert [(record["id"], record["broken"]) for record in records] == [(0, True), (1, True), (2, True)]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--link", "X->Q"], "unknown span 'Q'"),
        (["--link", "Y->X"], "by causality"),
        (["--link", "X->Y=heavy"], "weight is not a number"),
        (["--link", "X->Y=nan"], "--link, by weight, is [nan]"),
        (["--link", "X->Y=1", "--link", "X->Y=2"], "'X->Y' twice"),
        (["--link", "X->Y", "--link", "criteria->scores"], "names one link twice"),
        (["--link", "Z->X", "--target", "margin"], "no link ends in the scores"),
        (["--device", "warp:1"], "device is 'warp:1'"),
        (["-K", "-1"], "counterfactuals (K) is -1"),
        (["--also", "phi", "-K", "1", "--rank", "100000"], "rank is 100000"),
        (["--rank", "-2"], "rank is -2"),
        (["--energy", "1.5"], "energy is 1.5"),
        (["-p", "nan"], "--p is NaN"),
        (["--task-weight", "-1"], "--task-weight is -1"),
        (["--permutation", "shuffle"], "permutation is 'shuffle'"),
        (["--score", "size"], "score is 'size'"),
        (["--target", "size"], "target is 'size'"),
        (["--kind", "poet"], "--kind is 'poet'"),
        (["--leak-weight", "-1"], "--leak-weight is -1"),
        (["--guard", "all"], "guard is 'all'; expected one of strict, standard, criteria, off"),
        (["--guard", "off", "--kind", "reasoning"], "--guard cannot be used with --kind reasoning"),
        (["--dtype", "int3"], "--dtype is 'int3'"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--model", "./nowhere"], "does not exist"),
        (["--model", "nowhere.gguf"], "does not exist"),
        (["--output", "/proc/no/out.jsonl"], "/proc cannot be written to"),
        (["--input", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--ray", "0"], "--ray is 0"),
        (["--ray", "2", "--device", "cuda:1"], "device is 'cuda:1'; expected cpu or cuda with --ray"),
        (["--ray", "2", "--save-jacobians", "matrices"], "--save-jacobians cannot be used with --ray"),
        (["--ray", "2"], "--ray needs Ray, which is an extra: pip install 'cepo[ray]'"),
    ],
)
def test_bad_arguments_end_in_one_paragraph_before_a_model_is_loaded(
    arguments: list[str], complaint: str, judge: Path, tmp_path: Path, cepo: Cepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer_module, "load_weights", lambda *_, **__: pytest.fail("a model was loaded first"))
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    source = write_jsonl(tmp_path / "in.jsonl", gold_rows())
    defaults = ["--model", str(judge), "--input", str(source), "--output", str(tmp_path / "out.jsonl")]
    code, message = cepo(*defaults, *arguments)  # a repeated option wins over the one before
    assert code == 2
    assert complaint in message
    assert message.count("\n") <= 2
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "is empty"),
        ("{broken\n", "no usable row"),
        ('{"prompt": "x", "completion": null}\n', "Its first row holds no known form (prompt, completion (empty))"),
        ('{"question": "x"}\n', "lacks the column prompt"),
    ],
)
def test_unusable_input_is_refused(content: str, complaint: str, judge: Path, tmp_path: Path, cepo: Cepo) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(content)
    code, message = cepo("--model", judge, "--input", source, "--output", tmp_path / "out.jsonl")
    assert code == 2
    assert complaint in message
