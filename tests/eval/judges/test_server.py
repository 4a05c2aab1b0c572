"""Protects judging with a server: its protocol, patience with failures, parameters that it refuses, its address."""

import http.server
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cepo.eval.judges.journal import JudgeTask, collect_judgements
from cepo.eval.judges.server import ServerJudge, _retry_after
from cepo.eval.judges.settings import Judgement, JudgeSettings, row_seed
from tests.eval.judges.fake_judge import VERDICT, judged, messages


class Server:
    """A loopback server whose answers a function decides, from the number of the request (0 first) and its body."""

    def __init__(self, answer: Callable[["Handler", int, dict[str, Any]], None]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.times: list[float] = []
        self.closing = threading.Event()
        lock = threading.Lock()
        server = self

        class Bound(Handler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(server.requests)
                    server.requests.append(body | {"path": self.path})
                    server.headers.append(dict(self.headers))
                    server.times.append(time.monotonic())
                self.closing = server.closing
                answer(self, number, body)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    closing: threading.Event

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def judge(self, text: str | None = VERDICT, **choice: Any) -> None:
        answer = {
            "choices": [{"message": {"role": "assistant", "content": text}, **choice}],
            "usage": {"completion_tokens": 7},
        }
        self.send(200, json.dumps(answer).encode())

    def drop(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)

    def hang(self) -> None:
        self.closing.wait(20)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    servers: list[Server] = []

    def start(answer: Callable[[Handler, int, dict[str, Any]], None]) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def ask(server: Server, count: int = 1, **settings: Any) -> list[Judgement]:
    values = {"backoff_s": 0.01, "timeout_s": 5.0, "retries": 5, "concurrency": 1, **settings}
    judge = ServerJudge(JudgeSettings("name", backend="server", base_url=server.url, **values))
    return judged(judge, [messages(f"prompt {number}") for number in range(count)])


def test_a_server_is_asked_in_openais_protocol_and_its_answer_read(serve: Callable[..., Server]) -> None:
    server = serve(lambda handler, number, body: handler.judge())
    (found,) = ask(server, api_key="sk-1", max_new_tokens=9, temperature=0.5, seed=3)
    assert (found.text, found.tokens, found.error, found.soft) == (VERDICT, 7, None, None)
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["messages"] == messages("prompt 0")
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("name", 9, 0.5)
    assert request["seed"] == row_seed(3, messages("prompt 0"))
    assert server.headers[0]["Authorization"] == "Bearer sk-1"


def test_a_server_that_hangs_drops_lies_and_refuses_loses_no_row(serve: Callable[..., Server]) -> None:
    """One row meets every trouble in turn and is judged at last; the rows behind it are judged as ever."""

    def answer(handler: Handler, number: int, body: dict[str, Any]) -> None:
        if number == 0:
            handler.hang()
        elif number == 1:
            handler.drop()
        elif number == 2:
            handler.send(200, b"<html>gateway</html>")
        elif number == 3:
            handler.send(429, b"{}", Retry_After="0.3")
        elif number == 4:
            handler.send(503, b"busy")
        else:
            handler.judge(f"{body['messages'][0]['content']} {VERDICT}")

    server = serve(answer)
    found = ask(server, 3, timeout_s=0.5)
    assert [judgement.text for judgement in found] == [f"prompt {number} {VERDICT}" for number in range(3)]
    assert len(server.requests) == 5 + 3
    assert server.times[4] - server.times[3] >= 0.3  # what Retry-After asked for, not the back-off's 0.08


def half_an_answer(handler: Handler, number: int, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')


def drop_by_drop(handler: Handler, number: int, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.end_headers()
    while not handler.closing.wait(0.05):
        try:
            handler.wfile.write(b" ")
            handler.wfile.flush()
        except OSError:
            return


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda handler, number, body: handler.hang(), "no answer within 0.4 s"),
        (drop_by_drop, "no answer within 0.4 s"),
        (lambda handler, number, body: handler.drop(), "connection"),
        (half_an_answer, "connection broke"),
        (lambda handler, number, body: handler.send(200, b"garbage"), "not JSON: b'garbage'"),
        (lambda handler, number, body: handler.send(200, b"[" * 100_000), "not JSON"),
        (lambda handler, number, body: handler.send(200, b'{"error": "x"}'), "no choices"),
        (lambda handler, number, body: handler.send(200, b'{"choices": [null]}'), "no choices"),
        (lambda handler, number, body: handler.judge(None), "no content"),
        (lambda handler, number, body: handler.send(500, b'{"error": "out of  memory"}'), "500: .*out of memory"),
    ],
)
def test_a_row_that_fails_for_good_is_told_with_its_reason(
    serve: Callable[..., Server], answer: Callable[..., None], reason: str
) -> None:
    server = serve(answer)
    (found,) = ask(server, retries=1, timeout_s=0.4)
    assert found.error is not None
    assert re.search(reason, found.error), found.error
    assert "tried 2x" in found.error
    assert len(server.requests) == 2


def test_what_only_one_prompt_is_refused_for_is_not_sent_again(serve: Callable[..., Server]) -> None:
    def answer(handler: Handler, number: int, body: dict[str, Any]) -> None:
        if body["messages"][0]["content"] == "prompt 1":
            handler.send(400, b"prompt too long")
        else:
            handler.judge()

    server = serve(answer)
    found = ask(server, 3)
    assert [judgement.error is None for judgement in found] == [True, False, True]
    assert "prompt too long" in str(found[1].error)
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("name", "status", "refusal"),
    [
        (
            "max_tokens",
            400,
            "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
        ),
        ("temperature", 400, "Unsupported value: 'temperature' does not support 0. Only the default (1) is supported."),
        ("temperature", 400, "Unsupported parameter: 'temperature' is not supported with this model."),
        ("seed", 422, '{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}'),
        ("top_logprobs", 422, "top_logprobs must be less than or equal to 5"),
        ("logprobs", 500, "logprobs is not supported"),
    ],
)
def test_a_parameter_that_a_server_refuses_is_left_out_from_then_on(
    serve: Callable[..., Server], caplog: pytest.LogCaptureFixture, name: str, status: int, refusal: str
) -> None:
    """Without a retry of its own, and with a word in the log, once."""

    def answer(handler: Handler, number: int, body: dict[str, Any]) -> None:
        if name in body:
            handler.send(status, refusal.encode())
        else:
            handler.judge()

    server = serve(answer)
    assert [found.error for found in ask(server, 3, retries=0, max_new_tokens=9)] == [None] * 3
    assert [name in request for request in server.requests] == [True, False, False, False]
    assert server.requests[-1].get("max_completion_tokens", server.requests[-1].get("max_tokens")) == 9
    assert caplog.text.count("the server refuses") == 1


def test_several_parameters_are_left_out_and_a_size_that_is_refused_is_not_a_parameter(
    serve: Callable[..., Server],
) -> None:
    def answer(handler: Handler, number: int, body: dict[str, Any]) -> None:
        for name in ("max_tokens", "temperature", "logprobs"):
            if name in body:
                handler.send(400, f"Unsupported: '{name}'; max_completion_tokens is.".encode())
                return
        handler.judge()

    server = serve(answer)
    assert ask(server, retries=0)[0].error is None
    assert len(server.requests) == 4
    too_large = b"'max_tokens' or 'max_completion_tokens' is too large: 512. The model's context is 300 tokens."
    server = serve(lambda handler, number, body: handler.send(400, too_large))
    assert "is too large" in str(ask(server, retries=3)[0].error)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_carries_the_key_nowhere(serve: Callable[..., Server], status: int) -> None:
    """It ends the run and names the address, which the user can give."""
    elsewhere = serve(lambda handler, number, body: handler.judge())
    server = serve(lambda handler, number, body: handler.send(status, b"", Location=elsewhere.url + "/v1"))
    with pytest.raises(ValueError, match=re.escape(elsewhere.url)):
        ask(server, api_key="sk-1")
    assert (len(server.requests), elsewhere.requests) == (1, [])


def test_a_proxy_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "gopher://127.0.0.1:1")
    with pytest.raises(ValueError, match="ALL_PROXY.*gopher"):
        ServerJudge(JudgeSettings("name", backend="server", base_url="http://127.0.0.1:9"))


@pytest.mark.parametrize(
    ("tail", "path", "header"),
    [
        ("", "/v1/chat/completions", ("Authorization", "Bearer sk-1")),
        ("/v1/", "/v1/chat/completions", ("Authorization", "Bearer sk-1")),
        ("/api/v1/chat/completions", "/api/v1/chat/completions", ("Authorization", "Bearer sk-1")),
        (
            "/openai/deployments/x?api-version=1",
            "/openai/deployments/x/chat/completions?api-version=1",
            ("api-key", "sk-1"),
        ),
    ],
)
def test_forms_of_an_address(serve: Callable[..., Server], tail: str, path: str, header: tuple[str, str]) -> None:
    """Azure's has a query, and a header of its own for the key."""
    server = serve(lambda handler, number, body: handler.judge())
    server.url += tail
    assert ask(server, api_key="sk-1")[0].text == VERDICT
    assert server.requests[0]["path"] == path
    names = {name.lower(): value for name, value in server.headers[0].items()}
    assert {key: names[key] for key in ("authorization", "api-key") if key in names} == {header[0].lower(): header[1]}


def test_cut_judgements_are_kept_and_counted_aloud(
    serve: Callable[..., Server], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of the thoughts are cut: rows without a verdict, which the next run does not ask for again."""

    def answer(handler: Handler, number: int, body: dict[str, Any]) -> None:
        if number % 2:
            handler.judge(message={"content": None, "reasoning": "Let me think"}, finish_reason="length")
        else:
            handler.judge()

    server = serve(answer)
    settings = JudgeSettings("name", backend="server", base_url=server.url, retries=0, concurrency=1)
    tasks = [JudgeTask(str(row), messages(f"prompt {row}")) for row in range(4)]
    for _ in range(2):
        collected = collect_judgements(tasks, tmp_path, {"command": "x"}, lambda: ServerJudge(settings))
    assert len(server.requests) == 4
    assert not collected.failed
    assert [record["cut"] for record in collected.records.values()] == [False, True, False, True]
    assert "2 of 4 judgements were cut" in caplog.text
    assert "--max-new-tokens" in caplog.text


def test_an_address_that_is_refused_ends_the_run_at_once(serve: Callable[..., Server]) -> None:
    server = serve(lambda handler, number, body: handler.send(404, b"no such model"))
    with pytest.raises(ValueError, match="404 for model 'name': no such model"):
        ask(server, 4, concurrency=2)


def test_a_dead_server_is_given_up_and_rows_that_were_not_tried_say_so(serve: Callable[..., Server]) -> None:
    server = serve(lambda handler, number, body: handler.drop())
    found = ask(server, 30, retries=0)
    assert all(judgement.error for judgement in found)
    assert sum("not tried" in str(judgement.error) for judgement in found) == 20
    assert len(server.requests) == 10


def test_requests_run_side_by_side(serve: Callable[..., Server]) -> None:
    together = threading.Barrier(4, timeout=5)

    def answer(handler: Handler, number: int, body: dict[str, Any]) -> None:
        together.wait()
        handler.judge(body["messages"][0]["content"])

    server = serve(answer)
    judge = ServerJudge(JudgeSettings("name", backend="server", base_url=server.url + "/v1", concurrency=4, retries=0))
    asked = [f"prompt {number}" for number in range(4)]
    assert [one.text for one in judged(judge, [messages(prompt) for prompt in asked])] == asked


def told(token: str, alternatives: Mapping[str, float]) -> dict[str, Any]:
    options = [
        {"token": text, "bytes": list(text.encode()), "logprob": math.log(p)} for text, p in alternatives.items()
    ]
    return {"token": token, "bytes": list(token.encode()), "logprob": options[0]["logprob"], "top_logprobs": options}


def test_expected_scores_come_from_top_logprobs(serve: Callable[..., Server]) -> None:
    content = [
        told("<scores>\\boxed{", {"<scores>\\boxed{": 1.0}),
        told("8", {"8": 0.5, "4": 0.25, "x": 0.25}),
        told(", ", {", ": 1.0}),
        told("6", {"6": 1.0}),
        told("}</scores>", {"}</scores>": 1.0}),
    ]
    server = serve(lambda handler, number, body: handler.judge(logprobs={"content": content}))
    (found,) = ask(server)
    assert found.soft == pytest.approx(((0.5 * 8 + 0.25 * 4) / 0.75, 6.0))


@pytest.mark.parametrize(
    "logprobs",
    [{}, {"content": None}, {"content": [{"token": 3}]}, {"content": [told("\\boxed{1, 2}", {"x": 1.0})]}, "x"],
)
def test_log_probabilities_that_do_not_fit_the_text_give_no_expected_scores(
    serve: Callable[..., Server], logprobs: Any
) -> None:
    server = serve(lambda handler, number, body: handler.judge(logprobs=logprobs))
    (found,) = ask(server)
    assert (found.error, found.soft) == (None, None)


def test_retry_after_is_seconds_or_a_date() -> None:
    assert _retry_after("2.5") == 2.5
    assert _retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0.0
    assert _retry_after("soon") is None
    assert _retry_after(None) is None
