"""Protects `cepo score`: every input form, honest records, matrices that check."""

import html
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cepo.cli.app import main
from cepo.eval.report.numbers import digits
from cepo.eval.score.rows import read_rollout
from cepo.jacobian.loading import load_model, resolve_model
from cepo.jacobian.reading.spans import SpanReader
from cepo.train import testbed
from cepo.train.prompts import JUDGE, judge_prompt
from tests.eval.score.records import check_alike
from tests.eval.score.rollouts import ALONE, ITEMS, LINKS, WIDE, Cepo, gold_rows
from tests.jsonl import read_jsonl, write_jsonl

PARTS = ("base", "residual", "source_positions", "target_positions")


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


def test_matrices_that_nothing_computes_are_not_asked_for(judge: Path, tmp_path: Path, cepo: Cepo) -> None:
    """The default score compares with donors: the file held the ids alone."""
    source, out = write_jsonl(tmp_path / "in.jsonl", gold_rows()), tmp_path / "out.jsonl"
    code, message = cepo("--model", judge, "--input", source, "--output", out, "--save-jacobians", tmp_path / "m")
    assert code == 2
    assert "--save-jacobians has nothing to save: the score 'effect' reads no Jacobian; add --also influence" in message


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
