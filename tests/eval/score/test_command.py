"""Protects `cepo score`: every input form, honest records, matrices that check, resume, and helpful errors."""

import html
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cepo.cli.app import main
from cepo.eval.report.numbers import digits
from cepo.eval.score import command as score_module
from cepo.eval.score import scorer as scorer_module
from cepo.eval.score.rows import read_rollout
from cepo.files import append_jsonl
from cepo.fusion.config import RewardConfig
from cepo.jacobian.loading import load_model, resolve_model
from cepo.jacobian.reading.spans import SpanReader
from cepo.train import testbed
from cepo.train.prompts import JUDGE, judge_prompt
from tests.eval.score.records import check_alike

ITEMS = testbed.generate_items(5, seed=9, cue_agreement=0.5)
LINKS = ["Z->X", "X->Y", "Z->Y"]
WIDE = ("--dtype", "float64")
ALONE = ("--link", "X->Y", "--score", "influence")  # what a row has without rows of other prompts, its donors
PARTS = ("base", "residual", "source_positions", "target_positions")


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def gold_rows() -> list[dict[str, Any]]:
    return [{"id": str(n), "prompt": item.prompt, "completion": item.completion} for n, item in enumerate(ITEMS)]


class Cepo:
    """Runs `cepo score` as a user would and returns its exit code and what it said on stderr."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> tuple[int, str]:
        self.monkeypatch.setattr(sys, "argv", ["cepo", "score", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        return int(exit_.value.code or 0), self.capsys.readouterr().err


@pytest.fixture
def cepo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cepo:
    return Cepo(monkeypatch, capsys)


def test_records_and_matrices_agree_with_each_other(judge: Path, tmp_path: Path, cepo: Cepo) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", gold_rows())
    out, matrices, page = tmp_path / "out.jsonl", tmp_path / "j.safetensors", tmp_path / "o.html"
    code, _ = cepo(
        *("--model", judge, "--input", source, "--output", out, "--save-jacobians", matrices, "--html", page),
        *("-K", 2, "--score", "influence", "--also", "phi", *(part for link in LINKS for part in ("--link", link))),
    )
    assert code == 0
    saved = load_file(matrices)
    tokenizer = testbed.build_tokenizer()
    records = read_jsonl(out)
    assert [record["row"] for record in records] == list(range(len(ITEMS)))
    assert set(saved) == {
        f"{row}/{key}"
        for row in range(len(ITEMS))
        for key in (
            "token_ids",
            *(
                f"{link}/{part}"
                for link in LINKS
                for part in ("base", "residual", "source_positions", "target_positions")
            ),
        )
    }
    for record, item in zip(records, ITEMS, strict=True):
        row = record["row"]
        token_ids = saved[f"{row}/token_ids"].tolist()
        completion = tokenizer(item.completion)["input_ids"]
        assert token_ids[-len(completion) :] == completion
        assert record["malformed"] is None
        assert record["spans"]["criteria"]["text"] == item.criteria
        for link in LINKS:
            facts = record["links"][link]
            base, residual = saved[f"{row}/{link}/base"].double(), saved[f"{row}/{link}/residual"].double()
            singular = torch.linalg.svdvals(residual)
            assert facts["phi"] == pytest.approx(float(singular[0] ** 2 / (singular**2).sum()), rel=1e-6)
            assert facts["retained"] == pytest.approx(float(residual.square().sum() / base.square().sum()), rel=1e-6)
            assert facts["norm"] == pytest.approx(float(base.norm()), rel=1e-6)
            assert facts["S"] == facts["influence"]
            assert 0.0 < facts["influence"] < 1.0
            assert facts["tokens"] == len(base) == len(saved[f"{row}/{link}/source_positions"])
            removed = torch.linalg.svdvals(base - residual)
            assert float(removed[2]) < 1e-5 * float(removed[0])  # rank 2, to float32 rounding
        digits = [token_ids[position] for position in saved[f"{row}/X->Y/target_positions"].tolist()]
        assert tokenizer.convert_ids_to_tokens(digits) == [str(score) for score in item.scores]
    assert "<script" not in page.read_text()
    assert not list(tmp_path.glob("*.partial"))
    assert not list(tmp_path.glob("*.jacobians"))


def test_paths_give_attributions_that_add_up(judge: Path, tmp_path: Path, cepo: Cepo) -> None:
    """Tokens and criteria of a link sum to the path's estimate; the page has both; an effect alone says what to ask."""
    source, out, page = write_jsonl(tmp_path / "in.jsonl", gold_rows()[:3]), tmp_path / "out", tmp_path / "o.html"
    arguments = ("--model", judge, "--input", source, "--link", "chain", "--score", "effect", "--donor-count", 1)
    assert cepo(*arguments, "--also", "path", "--nodes", 1, "--output", out, "--html", page)[0] == 0
    for record in read_jsonl(out):
        for link in record["links"].values():
            assert sum(link["attribution"]) == pytest.approx(link["path_sum"], abs=1e-4)
            assert sum(one["nats"] for one in link["criteria"]) == pytest.approx(link["path_sum"], abs=1e-6)
            shares = sum(one["share"] for one in link["criteria"])
            assert shares == pytest.approx(link["path_sum"] / link["delta"], rel=1e-4)
        item = ITEMS[record["row"]]
        assert [one["text"] for one in record["links"]["criteria->analysis"]["criteria"]] == [item.criteria]
    written = page.read_text()
    assert "Attribution of criteria-&gt;analysis" in written
    assert "--also path" not in written
    assert cepo(*arguments, "--output", tmp_path / "effect", "--html", page)[0] == 0
    assert "criteria" not in read_jsonl(tmp_path / "effect")[0]["links"]["criteria->analysis"]
    assert "score with --also path" in page.read_text()


def test_batch_size_order_and_repetition_change_nothing(judge: Path, tmp_path: Path, cepo: Cepo) -> None:
    """In float64: in float32 an effect, a difference of sums of tens of nats, is rounded at its sixth decimal."""
    rows = gold_rows()
    outputs = []
    for name, order, batch in (("a", rows, 1), ("b", rows, 4), ("c", rows[::-1], 3), ("d", rows, 4)):
        source = write_jsonl(tmp_path / f"{name}.jsonl", order)
        out = tmp_path / f"{name}.out"
        assert cepo("--model", judge, "--input", source, "--output", out, "--batch-size", batch, *WIDE)[0] == 0
        outputs.append({record["id"]: {**record, "row": 0} for record in read_jsonl(out)})
    for found in outputs[1:]:
        check_alike({key: found[key] for key in outputs[0]}, outputs[0], 1e-6)


def test_all_forms_of_input_give_the_same_rollout(judge: Path, tmp_path: Path, cepo: Cepo) -> None:
    tokenizer = testbed.build_tokenizer()
    item = ITEMS[0]
    messages = [{"role": "user", "content": item.prompt}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    rows = [
        {"prompt": item.prompt, "completion": item.completion},
        {"prompt": messages, "completion": [{"role": "assistant", "content": item.completion}]},
        {"messages": messages, "completion": item.completion},
        {"prompt_ids": ids["input_ids"], "completion_ids": tokenizer(item.completion)["input_ids"]},
        {"prompt": item.prompt.replace("Response B: ", "Response A: "), "completion": item.completion},
    ]
    out, options = tmp_path / "out.jsonl", (*ALONE, "--also", "order_leak")
    assert cepo("--model", judge, "--input", write_jsonl(tmp_path / "in", rows), "--output", out, *options)[0] == 0
    first, *others, unclear = read_jsonl(out)
    assert (unclear["malformed"], unclear["order_leak"]) == (None, None)  # nothing marks its second response
    assert first["order_leak"] != 0.0
    assert all(other["order_leak"] == first["order_leak"] for other in others)
    assert first["malformed"] is None
    assert all(other["links"] == first["links"] and other["spans"] == first["spans"] for other in others)
    raw = tmp_path / "raw.jsonl"
    source = write_jsonl(tmp_path / "raw", [{"prompt": rendered, "completion": item.completion}])
    assert cepo("--model", judge, "--input", source, "--output", raw, *ALONE, "--raw")[0] == 0
    assert read_jsonl(raw)[0]["links"] == first["links"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: it can write any text."""
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    template = testbed.build_tokenizer().chat_template
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)


def test_a_preference_row_gets_the_judge_prompt_with_the_chosen_response_where_the_label_says() -> None:
    tokenizer = byte_tokenizer()
    reader = SpanReader(tokenizer, JUDGE)
    row = {
        "prompt": "write a poem",
        "chosen": "lucid, [Response B]",
        "rejected": "rude",
        "judge_output": ITEMS[0].completion,
    }
    for label, shown in (("A", (row["chosen"], "rude")), ("B", ("rude", row["chosen"]))):
        rollout = read_rollout({**row, "label": label}, reader)
        assert rollout.malformed is None
        wanted = tokenizer.apply_chat_template(
            judge_prompt("write a poem", *shown), add_generation_prompt=True, tokenize=True, return_dict=True
        )
        assert list(rollout.prompt_ids) == wanted["input_ids"]
        # Only the query and the responses are content; the judge's instructions are not.
        assert rollout.spans["prompt"].text == " … ".join(("write a poem", *shown))


def test_a_killed_run_goes_on_where_it_stopped(
    judge: Path, tmp_path: Path, cepo: Cepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", gold_rows())
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    arguments = ("--model", judge, "--input", source, *ALONE, "--also", "effect", *WIDE)
    matrices = {name: tmp_path / f"{name}.safetensors" for name in ("whole", "broken")}
    assert cepo(*arguments, "--output", whole, "--save-jacobians", matrices["whole"])[0] == 0
    written: list[int] = []

    def append(path: Path, records: list[dict[str, Any]]) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt  # what a kill leaves: three rows on disk, though all five are scored together
        written.extend(record["row"] for record in records)
        append_jsonl(path, records)

    monkeypatch.setattr(score_module, "append_jsonl", append)
    assert cepo(*arguments, "--output", broken, "--save-jacobians", matrices["broken"])[0] != 0
    assert not broken.exists()
    with (tmp_path / "broken.jsonl.partial").open("a") as file:
        file.write('{"row": 3, "cut')  # a line that the kill cut short
    kept = set(written)
    written.clear()
    assert cepo(*arguments, "--output", broken, "--save-jacobians", matrices["broken"])[0] == 0
    assert sorted(written) == sorted(set(range(5)) - kept)
    check_alike(read_jsonl(broken), read_jsonl(whole), 1e-6)
    first, second = load_file(matrices["whole"]), load_file(matrices["broken"])
    assert first.keys() == second.keys()
    for key in first:
        one, other = first[key].double(), second[key].double()
        assert float((one - other).norm()) <= 1e-6 * float(one.norm())


def test_a_finished_output_is_not_computed_again_nor_mixed_with_other_settings(
    judge: Path, tmp_path: Path, cepo: Cepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", gold_rows())
    arguments = ("--model", judge, "--input", source, "--output", tmp_path / "out.jsonl")
    assert cepo(*arguments, "--donor-count", 1)[0] == 0
    monkeypatch.setattr(scorer_module, "load_weights", lambda *_, **__: pytest.fail("nothing is left to score"))
    assert cepo(*arguments, "--donor-count", 1)[0] == 0
    assert cepo(*arguments, "--donor-count", 1, "--memory-gib", 2, "--batch-size", 3)[0] == 0  # they change no result
    code, message = cepo(*arguments, "--donor-count", 2)
    assert code == 2
    assert f"--output {tmp_path / 'out.jsonl'} holds results made with other settings: --donor-count was 1" in message
    code, message = cepo(*arguments, *ALONE)
    assert code == 2
    assert "--score was effect and is influence" in message
    assert "each other's donors" not in message  # read no longer, since the score is another
    code, message = cepo(*arguments, "--donor-count", 1, "--guard", "off", "--also", "path")
    assert (code, "settings: --guard was standard and is off; --also was none and is path; name" in message) == (
        2,
        True,
    )


def test_the_tokenizer_is_read_once(judge: Path, tmp_path: Path, cepo: Cepo, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lies in a GGUF file takes seconds."""
    read: list[str] = []
    load = AutoTokenizer.from_pretrained

    def counted(location: str, **options: Any) -> Any:
        read.append(location)
        return load(location, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", counted)
    source = write_jsonl(tmp_path / "in.jsonl", gold_rows()[:1])
    assert cepo("--model", judge, "--input", source, "--output", tmp_path / "out", *ALONE)[0] == 0
    assert read == [str(judge)]


def test_other_weights_under_the_same_name_are_refused(judge: Path, tmp_path: Path, cepo: Cepo) -> None:
    """The fingerprint is the weights': a folder that was trained again gives no answers of before, its copy does."""
    model = tmp_path / "model"
    shutil.copytree(judge, model)
    source, out = write_jsonl(tmp_path / "in.jsonl", gold_rows()[:2]), tmp_path / "out.jsonl"
    arguments = ("--input", source, "--output", out)
    assert cepo("--model", model, *arguments)[0] == 0
    records = out.read_bytes()
    assert cepo("--model", judge, *arguments)[0] == 0
    weights = load_file(model / "model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})
    code, message = cepo("--model", model, *arguments)
    assert code == 2
    assert "made with other settings: --model has other content" in message
    assert out.read_bytes() == records


def test_a_run_that_failed_before_its_first_record_binds_no_settings(
    judge: Path, tmp_path: Path, cepo: Cepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", gold_rows()[:2])
    arguments = ("--model", judge, "--input", source, "--output", tmp_path / "out.jsonl")

    def fail(*_: object, **__: object) -> None:
        raise ValueError("no room for the weights")

    with monkeypatch.context() as patch:
        patch.setattr(scorer_module, "load_weights", fail)
        assert cepo(*arguments)[0] == 2
    assert cepo(*arguments, "--donor-count", 1)[0] == 0


def test_rows_that_changed_are_scored_again(
    judge: Path, tmp_path: Path, cepo: Cepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, out = gold_rows()[:3], tmp_path / "out.jsonl"
    arguments = ("--model", judge, "--input", tmp_path / "in.jsonl", "--output", out, *ALONE)
    write_jsonl(tmp_path / "in.jsonl", rows)
    assert cepo(*arguments)[0] == 0
    before = read_jsonl(out)
    write_jsonl(tmp_path / "in.jsonl", [rows[0], gold_rows()[3], rows[2]])
    scored: list[int] = []
    score_lines = score_module.score_lines
    monkeypatch.setattr(
        score_module,
        "score_lines",
        lambda *given, **options: scored.extend(options["rows"]) or score_lines(*given, **options),
    )
    assert cepo(*arguments)[0] == 0
    after = read_jsonl(out)
    assert scored == [1]
    assert [after[0], after[2]] == [before[0], before[2]]
    assert after[1]["id"] == "3"


def test_broken_lines_are_named_and_the_other_rows_scored(judge: Path, tmp_path: Path, cepo: Cepo) -> None:
    good = gold_rows()
    rows = [good[0], '{"prompt": "cut', good[1], {"prompt": "no completion"}, {**good[2], "task_reward": 7}, good[3]]
    out = tmp_path / "out.jsonl"
    code, message = cepo("--model", judge, "--input", write_jsonl(tmp_path / "in", rows), "--output", out)
    assert code == 2
    assert "line 2 is broken" in message
    assert "line 4: lacks the column completion: it holds no known form (prompt); most rows beside it hold" in message
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
    assert "the donors file" in message
    assert "of 1 prompt, and a donor is the content of another prompt's rollout" in message


def test_links_are_shown_and_donors_that_led_to_the_same_verdict_are_told(
    judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A chain of 0 shows its weak link. In a file with one verdict no effect on it can be seen, whatever its cause."""
    items = testbed.generate_items(8, seed=5, cue_agreement=0.5)
    by_label = {label: [item for item in items if item.label == label][:2] for label in "AB"}
    page, link = tmp_path / "o.html", "analysis->scores"
    for name, chosen, kind in (
        ("alike", by_label["A"], "same verdict"),
        ("mixed", by_label["A"][:1] + by_label["B"][:1], "donors"),
    ):
        rows = [{"prompt": item.prompt, "completion": item.completion} for item in chosen]
        source, out = write_jsonl(tmp_path / f"{name}.in", rows), tmp_path / name
        sys.argv = ["cepo", "score", *map(str, ("--model", judge, "--input", source, "--output", out, "--html", page))]
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code in (0, None)
        shown = " ".join(capsys.readouterr().out.split())
        records = [record["links"][link] for record in read_jsonl(out)]
        assert [record["against"] for record in records] == [kind] * 2
        mean = sum(record["delta"] for record in records) / 2
        assert f"mean effect {link} in nats {digits(mean)}" in shown
        assert f"mean S {link} (well-formed)" in shown
        written = page.read_text()
        assert f"<bdi>{digits(records[0]['delta'], sign='+')}</bdi>" in written
        told = "In 2 of 2 well-formed rows, every donor led to the row's own verdict"
        assert (told in shown) == (told in html.unescape(written)) == (kind == "same verdict")
        assert ("all led to the same verdict" in written) == (kind == "same verdict")


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


def test_matrices_that_nothing_computes_are_not_asked_for(judge: Path, tmp_path: Path, cepo: Cepo) -> None:
    """The default score compares with donors: the file held the ids alone."""
    source, out = write_jsonl(tmp_path / "in.jsonl", gold_rows()), tmp_path / "out.jsonl"
    code, message = cepo("--model", judge, "--input", source, "--output", out, "--save-jacobians", tmp_path / "m")
    assert code == 2
    assert "--save-jacobians has nothing to save: the score 'effect' reads no Jacobian; add --also influence" in message


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


def test_task_rewards_are_fused(judge: Path, tmp_path: Path, cepo: Cepo) -> None:
    rows = [{**gold_rows()[0], "task_reward": task} for task in (0.0, 1.0)]
    out = tmp_path / "out.jsonl"
    source = write_jsonl(tmp_path / "in", rows)
    options = ("--link", "X->Y=0.3", "--score", "influence", "-p", 1)
    assert cepo("--model", judge, "--input", source, "--output", out, *options)[0] == 0
    lose, win = (record["reward"] for record in read_jsonl(out))
    assert win - lose == pytest.approx(0.7)


def test_reasoning_rows(judge: Path, tmp_path: Path, cepo: Cepo) -> None:
    row = {"prompt": ITEMS[0].prompt, "completion": "<analysis>judge by clarity</analysis>\n<scores> lucid</scores>"}
    out = tmp_path / "out.jsonl"
    arguments = ("--kind", "reasoning", "--rationale-tag", "analysis", "--answer-tag", "scores")
    source = write_jsonl(tmp_path / "in", [row])
    assert cepo("--model", judge, "--input", source, "--output", out, *ALONE, *arguments)[0] == 0
    (record,) = read_jsonl(out)
    assert record["spans"]["rationale"]["text"] == "judge by clarity"
    assert record["spans"]["answer"]["text"] == "lucid"


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
        (["--model", "./nowhere"], "is not there"),
        (["--model", "nowhere.gguf"], "is not there"),
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


def test_files_that_would_be_lost_are_refused(judge: Path, tmp_path: Path, cepo: Cepo) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", gold_rows())
    content = source.read_bytes()
    out, page = tmp_path / "out.jsonl", tmp_path / "page.html"
    (tmp_path / "alias").symlink_to(source)
    for arguments in (
        ("--output", out, "--html", source),
        ("--output", out, "--html", tmp_path / "alias"),
        ("--output", source),
        ("--output", out, "--save-jacobians", out),
        ("--output", out, "--save-jacobians", page, "--html", page),
        ("--output", tmp_path),
        ("--output", out, "--html", tmp_path),
        ("--output", out, *ALONE, "--save-jacobians", write_jsonl(tmp_path / "other.txt", [{}])),
    ):
        code, message = cepo("--model", judge, "--input", source, *arguments)
        assert code == 2, arguments
        assert "name another" in message or "is a folder" in message
    assert source.read_bytes() == content
    assert not out.exists()


def test_matrices_are_taken_over_only_with_the_settings_and_the_row_that_made_them(
    judge: Path, tmp_path: Path, cepo: Cepo
) -> None:
    """They belong to the records beside them: those of other settings are refused, those of other rows made anew."""
    source, out, matrices = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "j.safetensors"
    rows = gold_rows()
    arguments = ("--model", judge, "--input", source, *ALONE)
    save = ("--output", out, "--save-jacobians", matrices)
    write_jsonl(source, rows[:2])
    assert cepo(*arguments, *save)[0] == 0
    kept = matrices.read_bytes()
    code, message = cepo(
        *arguments, "--dtype", "float64", "--output", tmp_path / "other.jsonl", "--save-jacobians", matrices
    )
    assert code == 2
    assert "holds matrices of another model or other settings; name another file" in message
    assert matrices.read_bytes() == kept
    assert not (tmp_path / "other.jsonl.settings.json").exists()
    code, message = cepo(*arguments, "--output", out, "--save-jacobians", judge / "model.safetensors")
    assert code == 2
    assert "was not written by cepo score" in message
    write_jsonl(source, [rows[0], rows[3]])
    assert cepo(*arguments, "--output", out)[0] == 0  # row 1 has a new record now, and matrices of before
    assert cepo(*arguments, *save)[0] == 0
    saved = load_file(matrices)
    for row, record in enumerate(read_jsonl(out)):
        assert record["links"]["X->Y"]["norm"] == pytest.approx(float(saved[f"{row}/X->Y/base"].norm()), rel=1e-6)


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


def test_models_resolve_by_kind(judge: Path, tmp_path: Path) -> None:
    assert resolve_model(str(judge)).location == str(judge)
    assert resolve_model("Qwen/Qwen3-0.6B").location == "Qwen/Qwen3-0.6B"
    smollm2 = resolve_model("smollm2")
    assert smollm2.gguf_file is None or (Path(smollm2.location) / smollm2.gguf_file).is_file()
    for name in ("./absent", "/absent", "absent.gguf", "a/b/c", "", str(tmp_path)):
        with pytest.raises(ValueError, match="model is"):
            resolve_model(name)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="could not be loaded"):
        load_model(resolve_model(str(tmp_path)))
