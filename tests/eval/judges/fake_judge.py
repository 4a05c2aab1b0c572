"""A judge that follows a rule, in this process or behind a server, and a way to run the command line."""

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cepo.cli import app as cli
from cepo.eval.judges.settings import Judge, Judgement, JudgeSettings, Messages
from cepo.train.prompts import JUDGE_LITERALS

SETTINGS = JudgeSettings("name", backend="server", base_url="http://127.0.0.1:9/v1")
"""Settings of a judge that is never opened; they name no weights that would be hashed."""

VERDICT = "<scores>\\boxed{8, 6}</scores>"


def messages(text: str) -> list[dict[str, str]]:
    """The messages of a prompt."""
    return [{"role": "user", "content": text}]


def responses(messages: Messages) -> tuple[str, str]:
    """The responses A and B of a judge prompt."""
    _, _, rest = messages[0]["content"].partition(JUDGE_LITERALS[1])
    first, _, rest = rest.partition(JUDGE_LITERALS[2])
    return first, rest.removesuffix(JUDGE_LITERALS[3])


def verdict(first: float, second: float) -> str:
    return f"<scores>\n\\boxed{{{first:g}, {second:g}}}\n</scores>"


class FakeJudge:
    """Writes what a function of the two responses says; counts prompts; may be killed after some of them."""

    def __init__(self, write: Callable[[str, str], str], *, kill_after: int | None = None) -> None:
        self.write, self.kill_after = write, kill_after
        self.prompts: list[tuple[str, str]] = []

    def judge(self, prompts: Sequence[Messages]) -> Iterator[tuple[int, Judgement]]:
        for place, messages in enumerate(prompts):
            if len(self.prompts) == self.kill_after:
                raise KeyboardInterrupt
            self.prompts.append(responses(messages))
            text = self.write(*responses(messages))
            yield place, Judgement("", error="refused") if text == "error" else Judgement(text, tokens=1)

    def open(self, _: JudgeSettings) -> "FakeJudge":
        return self


def judged(judge: Judge, prompts: Sequence[Messages]) -> list[Any]:
    """A judge's answers in the order of the prompts, each of which has one."""
    answers = list(judge.judge(prompts))
    assert sorted(index for index, _ in answers) == list(range(len(prompts)))
    return [answer for _, answer in sorted(answers, key=lambda answer: answer[0])]


def prefers_word(word: str) -> Callable[[str, str], str]:
    """Score a response by whether it holds the word."""
    return lambda first, second: verdict(1 + 8 * (word in first), 1 + 8 * (word in second))


class _Server(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = prefers_word("good")(*responses(body["messages"]))
        message = {"role": "assistant", "content": text}
        answer = {
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"completion_tokens": 3},
        }
        payload = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler] = _Server) -> Iterator[str]:
    """Yield the address of a server, whose judge prefers the response with the word "good" unless told otherwise."""
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/v1"
    running.shutdown()
    thread.join()
    running.server_close()


def run_cepo(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run `cepo` as a user would and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["cepo", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)
