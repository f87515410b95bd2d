"""The server without ranks: what clients send, and what they are told.

An engine of letters answers (tests/helpers/serving.py): `a` is continued by `b`, `c`, `d`.
"""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections import Counter
from http.client import HTTPConnection
from types import SimpleNamespace

import pytest
from pydantic import ValidationError
from web_server import Letters, Stream, server_of

from dist_lab.errors import MachineError
from dist_lab.programs.serve import http, metrics, receive, respond
from dist_lab.programs.serve.refused import Refused
from dist_lab.programs.serve.router import Router
from dist_lab.programs.serve.schema import CompletionRequest, parse


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with server_of(tmp_path_factory.mktemp("line")) as running:
        yield running


@pytest.fixture
def held(tmp_path):
    """A server whose engine makes no step until `engine.gate` is set."""
    engine = Letters(slots=2)
    engine.gate.clear()
    with server_of(tmp_path, engine, max_queue=3) as running:
        yield running


# --- answers --------------------------------------------------------------------------------------


def test_a_completion_has_the_fields_of_openais_api(server):
    reply = server.complete("abc", 4)
    assert reply.status == 200
    answer = reply.json
    assert answer.pop("id").startswith("cmpl-")
    assert abs(answer.pop("created") - time.time()) < 60
    assert answer == {
        "object": "text_completion", "model": "007-letters",
        "choices": [{"index": 0, "text": "defg", "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }  # fmt: skip


def test_a_stream_has_a_part_for_each_token_and_then_done(server):
    *parts, usage, done = server.stream("é", 3, stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert [part["choices"][0]["text"] for part in parts] == ["+", ",", "-"]  # after byte A9
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None, None, "length"]
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert len({part["id"] for part in [*parts, usage]}) == 1


def test_a_chat_is_asked_by_the_template_and_answered_by_a_message(server):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ]
    asked = {"messages": messages, "max_completion_tokens": 3}
    answer = server.ask("/v1/chat/completions", asked).json
    prompt = "Be brief.\n\nUser: Hello\nAssistant:"
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["object"] == "chat.completion"
    message = {"role": "assistant", "content": ";<="}
    assert answer["choices"][0]["message"] == message
    body = json.dumps(asked | {"stream": True}).encode()
    *parts, _ = Stream(server.raw("/v1/chat/completions", body))
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert deltas == [{"role": "assistant", "content": ";"}, {"content": "<"}, {"content": "="}]
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}


def test_several_prompts_and_n_give_a_choice_each_with_a_seed_of_its_own(server):
    before = len(server.engine.log)
    answer = server.complete(["a", "x"], 2, n=2, seed=5, temperature=0.5, top_k=7).json
    texts = [(choice["index"], choice["text"]) for choice in answer["choices"]]
    assert texts == [(0, "bc"), (1, "bc"), (2, "yz"), (3, "yz")]
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 8, "total_tokens": 12}
    assert [line.partition(".")[2] for line in server.engine.log[before:]] == ["0", "1", "2", "3"]


def test_the_fields_of_a_request_reach_the_engine(held):
    with held.raw("/v1/completions", json.dumps({
        "prompt": [97, 98], "max_tokens": 9, "n": 2, "seed": 5, "temperature": 0.5, "top_k": 7,
        "top_p": 0.9, "stop": ["\n", "z"],
    }).encode()):  # fmt: skip
        held.until(lambda: len(held.engine.requests) == 2)
        first, second = held.engine.requests.values()
    assert (first.prompt, first.new_tokens, first.stops) == ([97, 98], 9, ["\n", "z"])
    sampling = first.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed) == (0.5, 7, 0.9, 5)
    assert second.sampling.seed == 6


def test_a_chat_also_stops_before_the_next_turn_of_its_user(held):
    asked = {"messages": [{"role": "user", "content": "Hello"}], "stop": "z"}
    with held.raw("/v1/chat/completions", json.dumps(asked).encode()):
        held.until(lambda: held.engine.requests)
        (request,) = held.engine.requests.values()
    assert request.stops == ["z", "\nUser:"]
    assert request.new_tokens == 256


def test_a_stop_string_ends_a_text(server):
    choice = server.complete("a", 20, stop="e").json["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("bcd", "stop")
    part, done = server.stream("a", 20, stop="b")  # the part that ends it has no text
    assert (part["choices"][0]["text"], part["choices"][0]["finish_reason"]) == ("", "stop")
    assert done == "[DONE]"


def test_fields_that_mean_off_are_accepted(server):
    off = {"logprobs": None, "presence_penalty": 0.0, "best_of": 1, "echo": False, "user": "me",
           "logit_bias": {}, "suffix": None, "temperature": None, "stop": None}  # fmt: skip
    assert server.complete("a", 1, **off).status == 200


# --- requests that are wrong ----------------------------------------------------------------------

WRONG = [
    ({"prompt": 3}, "prompt", "prompt cannot be 3: give a text, a list of tokens"),
    ({"prompt": ""}, "prompt", "prompt cannot be '': give a text"),
    ({"prompt": ["a", 3]}, "prompt", "prompt cannot be a list: give a text"),
    ({"prompt": [-1]}, "prompt", "prompt cannot be"),
    ({"prompt": [2**31]}, "prompt", "prompt cannot be"),
    ({"prompt": [10**4000]}, "prompt", "prompt cannot be"),
    ({}, "prompt", "prompt is missing"),
    ({"prompt": "a", "temprature": 1}, "temprature", "did you mean temperature?"),
    ({"prompt": "a", "x" * 99: 1}, "x" * 80, "there is no field 'xxx"),
    ({"prompt": "a", "temperature": "hot"}, "temperature", "cannot be 'hot': input should be a"),
    ({"prompt": "a", "temperature": 3}, "temperature", "cannot be 3: input should be less than"),
    ({"prompt": "a", "top_p": 0}, "top_p", "cannot be 0: input should be greater than 0"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens", "cannot be 0"),
    ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "cannot be 1.5"),
    ({"prompt": "a", "max_tokens": 10**40}, "max_tokens", "cannot be so large a number"),
    ({"prompt": "a", "n": True}, "n", "cannot be true"),
    ({"prompt": "a", "n": 17}, "n", "cannot be 17"),
    ({"prompt": ["a", "b"], "n": 9}, "n", "2 prompts with n 9 are 2 x 9 texts"),
    ({"prompt": "a", "stop": [1]}, "stop", "give a text of 1 to 256 characters, or a list"),
    ({"prompt": "a", "stop": ["b"] * 5}, "stop", "or a list of at most 4 of them"),
    ({"prompt": "a", "stop": ""}, "stop", "give a text of 1 to 256 characters, or a list"),
    ({"prompt": "a", "stream": 1}, "stream", "cannot be 1: input should be a valid boolean"),
    ({"prompt": "a", "logprobs": 0}, "logprobs", "logprobs 0 has no effect on this server"),
    ({"prompt": "a", "echo": True}, "echo", "echo true has no effect on this server"),
    ({"prompt": "a", "max_tokens": 2000}, "prompt", "the cache has room for 1000"),
    ({"prompt": "a" * 2000}, "prompt", "the prompt has at least 2,000 tokens"),
    ({"prompt": [300]}, "prompt", "token 300, and the vocabulary has 256"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "words"), WRONG)
def test_a_wrong_field_is_named(server, body, param, words):
    reply = server.ask("/v1/completions", body)
    assert reply.status == 400
    assert reply.error["param"] == param
    assert words in reply.error["message"]
    assert reply.error["type"] == "invalid_request_error"
    assert len(reply.error["message"]) < 250


WRONG_CHATS = [
    ("hi", "messages", "messages cannot be 'hi'"),
    ([], "messages", "messages cannot be a list"),
    ([{"role": "king", "content": "a"}], "messages[0].role", "cannot be 'king'"),
    ([{"role": "user"}], "messages[0].content", "messages[0].content is missing"),
    ([{"role": "user", "content": 3}], "messages[0].content", 'or a list of {"type": "text"'),
    ([{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "image_url"}]}],
     "messages[1].content", "messages[1].content"),
    ([{"role": "user", "content": "a", "x": 1}], "messages[0].x", "messages[0].x"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "param", "words"), WRONG_CHATS)
def test_a_wrong_message_is_named(server, messages, param, words):
    reply = server.ask("/v1/chat/completions", {"messages": messages})
    assert (reply.status, reply.error["param"]) == (400, param)
    assert words in reply.error["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"[1]", b'{"prompt": "a"', b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 100_000,
     b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "n": 1e999}', b"1" * 9999],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(server, body):
    reply = server.ask("/v1/completions", body)
    assert reply.status == 400
    assert "JSON" in reply.error["message"] or reply.error["param"] == "n"


@pytest.mark.parametrize(
    "fields",
    [{"prompt": [1] + ["a"] * 240_000}, {"prompt": [[]] * 300_000},
     {"prompt": [[1.5] * 60_000] * 4},
     {f"{i:x}": 1 for i in range(100_000)}, {"prompt": "a", "stop": [""] * 200_000}],
    ids=["words", "empty", "floats", "fields", "stops"],
)  # fmt: skip
def test_a_hostile_body_does_not_keep_others_waiting(fields):
    """An error for each of a hundred thousand items took a second, in which nobody was served."""
    with pytest.raises(ValidationError) as wrong:
        CompletionRequest.model_validate(fields)
    assert wrong.value.error_count() < 10


def test_a_long_prompt_of_many_texts_is_sent_to_rank_0_once(server):
    """Sixteen copies of it were a line that rank 0 takes for an attack."""
    assert server.complete("x" * 600_000, n=16).status == 400
    assert server.complete([1] * 300_000, n=16).status == 400
    assert server.complete().status == 200


def test_a_large_body_does_not_keep_others_waiting():
    """From its bytes to the line to rank 0."""
    body = json.dumps({"prompt": [1] * 340_000, "n": 16}).encode()

    async def seconds():
        router = Router(99)
        router.ready.set_result(None)
        start = time.process_time()
        asked = parse(body, CompletionRequest, "m")
        router.open([asked.of(prompt, 0) for prompt in asked.prompts])
        return time.process_time() - start

    assert asyncio.run(seconds()) < 0.7  # 0.1 as a rule; 5 with a copy for each text


def test_another_model_and_another_path_are_not_found(server):
    reply = server.complete(model="gpt-4")
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")
    assert "give '007-letters'" in reply.error["message"]
    assert server.complete(model="007-letters").status == 200
    for path in ("/v1/embeddings", "/../settings.py", "/page.py", "//etc/passwd"):
        assert server.ask(path).status == 404, path
    assert server.ask("/v1/completions").status == 405


def test_a_text_of_several_that_is_refused_leaves_none_of_the_others(server):
    reply = server.complete(["a", "b" * 998], 3)
    assert reply.status == 400
    assert server.engine.log[-1].startswith("cancel ")
    assert not server.engine.requests


def test_a_huge_body_is_413_by_its_header_and_by_its_bytes(server, monkeypatch):
    reply = server.ask("/v1/completions", b"x" * (receive.LARGEST_BODY + 1))
    assert reply.status == 413
    with server.raw("/v1/completions", b"", length=10**15) as connection:
        assert connection.recv(99).startswith(b"HTTP/1.1 413")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:  # no length
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json"
            b"\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        chunk = b"10000\r\n" + b"x" * 2**16 + b"\r\n"
        monkeypatch.setattr(receive, "MOST_READ", receive.LARGEST_BODY)
        for _ in range(receive.LARGEST_BODY // 2**16 + 1):
            connection.sendall(chunk)
        assert connection.recv(99).startswith(b"HTTP/1.1 413")


def test_a_slow_body_is_408_and_one_that_is_cut_off_is_forgotten(server, monkeypatch):
    monkeypatch.setattr(receive, "SLOWEST", 0.05)
    with server.raw("/v1/completions", b'{"prom', length=99) as connection:
        assert connection.recv(99).startswith(b"HTTP/1.1 408")
    server.raw("/v1/completions", b'{"prom', length=99).close()
    assert server.complete().status == 200


def test_browsers_of_other_sites_cannot_ask(server):
    reply = server.ask("/v1/completions", b'{"prompt": "a"}', {"content-type": "text/plain"})
    assert reply.status == 415
    for host in ("evil.example", "evil.example:8000", "", "127.0.0.1.evil.example"):
        assert server.ask("/health", headers={"host": host}).status == 421, host
    for host in ("localhost", "127.0.0.1:9", "[::1]", "[::1]:9"):
        assert server.ask("/health", headers={"host": host}).status == 200, host
    assert "access-control-allow-origin" not in server.ask("/v1/models").headers


# --- clients that go, and too many of them --------------------------------------------------------


def test_a_client_that_goes_away_is_cancelled_before_the_next_step(held):
    stream = held.stream("a", 50)
    other = held.stream("k", 3)
    held.until(lambda: len(held.engine.requests) == 2)
    stream.close()
    held.until(lambda: held.http._router.totals["cancelled"] == 1)
    held.engine.gate.set()
    assert other.text() == "lmn"
    assert held.engine.log == ["add 1.0", "add 2.0", "cancel 1.0"]
    assert held.engine.steps == 3  # the other's alone


def test_to_a_client_that_has_gone_no_more_parts_are_written(server, caplog):
    for _ in range(20):
        stream = server.stream("a", 50, n=16)
        next(iter(stream))
        stream.close()
    server.until(lambda: not server.engine.requests)
    assert "socket.send() raised exception" not in caplog.text


def test_a_client_that_waits_for_a_whole_answer_may_go_away_too(held):
    connection = held.raw("/v1/completions", b'{"prompt": "a", "max_tokens": 50}')
    held.until(lambda: held.engine.requests)
    connection.close()
    held.until(lambda: held.http._router.totals["cancelled"] == 1)
    held.engine.gate.set()
    held.until(lambda: not held.engine.requests)
    assert held.metric("dist_lab_blocks_used") == 0


def test_a_full_queue_is_429_with_retry_after_and_takes_more_when_it_is_shorter(held):
    streams = [held.stream("a", 3) for _ in range(3)]
    held.until(lambda: len(held.engine.requests) == 3)
    reply = held.complete("a")
    assert (reply.status, reply.headers["retry-after"]) == (429, "1")
    assert reply.error["code"] == "queue_full"
    assert reply.error["message"].startswith("3 texts wait for their turn, and 3 may;")
    never = held.complete("a", n=4)  # no queue is ever so short
    assert (never.status, never.error["param"]) == (400, "n")
    assert "asks for 4 texts, and 3 may wait" in never.error["message"]
    held.engine.gate.set()
    assert [stream.text() for stream in streams] == ["bcd"] * 3
    assert held.complete("a").status == 200


def test_a_client_that_reads_nothing_holds_up_nobody(server):
    slow = server.stream("a", 600, buffer=4096, n=16)
    start = time.monotonic()
    assert server.complete("a", 5).json["choices"][0]["text"] == "bcdef"
    assert time.monotonic() - start < 2
    server.until(lambda: not server.engine.requests)
    assert server.metric("dist_lab_open_texts") == 0
    slow.close()


def test_connections_without_a_request_are_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(http, "SILENT", 0.1)
    monkeypatch.setattr(http, "SWEEP", 0.05)
    with server_of(tmp_path) as server:
        stream = server.stream("a", 900)
        for head in (
            b"",
            b"POST /v1/comp",
            b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /",
        ):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
                connection.sendall(head)
                with contextlib.suppress(ConnectionResetError):
                    while connection.recv(4096):
                        pass
        assert len(stream.text()) == 900


@pytest.mark.slow
def test_a_connection_with_a_request_now_and_then_stays_open(tmp_path, monkeypatch):
    monkeypatch.setattr(http, "SILENT", 0.3)
    monkeypatch.setattr(http, "SWEEP", 0.02)
    with server_of(tmp_path) as server:
        connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
        sockets = set()
        for _ in range(20):
            connection.request("GET", "/health")
            assert connection.getresponse().read()
            sockets.add(connection.sock)
            time.sleep(0.05)
        assert len(sockets) == 1
        silent = sockets.pop()
        silent.settimeout(3)
        assert silent.recv(99) == b""
        connection.close()


def test_a_client_may_take_long_for_the_end_of_an_answer_while_it_takes_bytes(monkeypatch):
    monkeypatch.setattr(respond, "SLOWEST_READER", 0.3)
    monkeypatch.setattr(http, "SILENT", 0.1)
    monkeypatch.setattr(http, "SWEEP", 0.02)

    class Connection:
        """One whose answer has ended, and of which so many bytes are not sent yet."""

        def __init__(self, unsent):
            self.cycle, self.transport, self.unsent = self, self, unsent
            self.response_complete, self.aborted = True, False

        def is_closing(self):
            return False

        def get_write_buffer_size(self):
            return self.unsent

        def abort(self):
            self.aborted = True

    reads, stuck, silent = Connection(1000), Connection(1000), Connection(0)

    async def seen():
        sweeps = asyncio.create_task(http.close_silent({reads, stuck, silent}))
        for _ in range(12):
            await asyncio.sleep(0.05)
            reads.unsent -= 1
            if not stuck.aborted:
                early = silent.aborted
        sweeps.cancel()
        return early

    assert asyncio.run(seen())
    assert (reads.aborted, stuck.aborted, silent.aborted) == (False, True, True)


@pytest.mark.slow
def test_a_client_that_reads_nothing_for_long_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(respond, "SLOWEST_READER", 0.1)
    monkeypatch.setattr(http, "SILENT", 0.1)
    monkeypatch.setattr(http, "SWEEP", 0.05)
    with server_of(tmp_path, Letters(capacity=10**7)) as server:
        connection = server.stream("a", 10**6, buffer=4096, n=4).connection
        server.until(lambda: server.http._router.totals["cancelled"] == 4)
        server.until(lambda: not server.engine.requests)
        server.until(lambda: not sockets_with(server, connection))


def sockets_with(server, connection):
    """The server's connections with a client's socket."""
    state = server.http._web.server_state
    return [c for c in state.connections if c.client == connection.getsockname()]


def test_many_streams_at_once_are_whole(server):
    texts = {}

    def read(number):
        texts[number] = server.stream(chr(97 + number), 20).text()

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(8):
        expected = "".join(chr((96 + number + i) % 127 + 1) for i in range(1, 21))
        assert texts[number] == expected


# --- the end --------------------------------------------------------------------------------------


def test_a_graceful_stop_lets_texts_end_and_takes_no_more(tmp_path):
    with server_of(tmp_path, Letters(pace=0.01)) as server:
        stream = server.stream("a", 30)
        server.until(lambda: server.engine.running)
        server.http.end(Refused(503, "the server is stopping"), 5)
        assert len(stream.text()) == 30
        server.http.join(10)
        assert server.http.cut == 0
        with pytest.raises(OSError, match=r"refused|reset"):
            server.complete()


def test_a_stop_cuts_long_texts_with_an_error(tmp_path):
    with server_of(tmp_path, Letters(capacity=10**6, pace=0.01)) as server:
        stream = server.stream("a", 10**5)
        waits = server.raw("/v1/completions", b'{"prompt": "a", "max_tokens": 100000}')
        server.until(lambda: len(server.engine.running) == 2)
        server.http.end(Refused(503, "the server is stopping"), 0.1)
        events = [*stream]
        assert events[-1]["error"]["message"] == "the server is stopping"
        assert waits.recv(99).startswith(b"HTTP/1.1 503")
        waits.close()
        server.http.join(10)
        assert server.http.cut == 2


def test_when_rank_0_ends_open_clients_get_an_error(tmp_path):
    class Failing(Letters):
        def step(self):
            if self.steps == 3:
                raise MachineError("logits are not finite")
            return super().step()

    with server_of(tmp_path, Failing()) as server:
        events = [*server.stream("a", 9)]
        assert [event["choices"][0]["text"] for event in events[:-1]] == ["b", "c", "d"]
        assert events[-1]["error"]["type"] == "server_error"
        assert "model has failed" in events[-1]["error"]["message"]


def test_a_text_whose_logits_are_not_finite_is_an_error_for_its_request_alone(tmp_path):
    class Sick(Letters):
        def step(self):
            before = dict(self.requests)
            events = super().step()
            for event in events:
                if before[event.name].prompt == [ord("!")]:
                    event.text, event.reason = "", "failed"
                    self.cancel(event.name)
            return events

    with server_of(tmp_path, Sick(pace=0.01)) as server:
        other = server.stream("a", 20)
        *_, last = server.stream(["a", "!"], 900)
        assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "not_finite")
        reply = server.complete("!")
        assert (reply.status, reply.error["code"]) == (500, "not_finite")
        assert len(other.text()) == 20
        server.until(lambda: not server.engine.requests)
        assert server.metric("dist_lab_ended_failed_total") == 2
        assert server.metric("dist_lab_cancelled_total") == 1  # the "a" beside it
        assert server.metric("dist_lab_open_texts") == 0


# --- looking at it --------------------------------------------------------------------------------


def test_health_models_and_metrics(server):
    health = server.ask("/health")
    assert (health.status, health.json["status"]) == (200, "ok")
    assert [model["id"] for model in server.ask("/v1/models").json["data"]] == ["007-letters"]
    before = server.metric("dist_lab_generated_tokens_total")
    server.complete("a", 7)
    assert server.metric("dist_lab_generated_tokens_total") == before + 7
    reply = server.ask("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    for line in reply.text.splitlines():
        name, _, value = line.rpartition(" ")
        assert line.startswith(("# HELP dist_lab_", "# TYPE dist_lab_")) or (
            name.startswith("dist_lab_") and float(value) >= 0
        ), line


def test_a_count_has_all_its_digits():
    router = SimpleNamespace(totals=Counter(prompt_tokens=123_456_789), counts={}, open_texts=0)
    lines = metrics.metrics(router, {}).splitlines()
    assert "dist_lab_prompt_tokens_total 123456789" in lines


def test_the_page_may_load_its_own_files_alone(server):
    reply = server.ask("/")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name, kind in (("page.js", "text/javascript"), ("page.css", "text/css")):
        assert f'"{name}"' in reply.text
        assert server.ask(f"/{name}").headers["content-type"].startswith(kind)
    assert "http" not in reply.text
