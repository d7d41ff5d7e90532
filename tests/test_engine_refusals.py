"""What the engine's server refuses, over real HTTP: always a 4xx that names the field, the value and the limit."""

import gzip
import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest
from server_kit import Json, ask, call, complete, prompt, running, small

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "t5 t6"}


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with running(small(tmp_path_factory.mktemp("refusals"))) as (process, port):
        yield port
        assert complete(port, ask([5]))["usage"]["completion_tokens"] == 20  # after all that was asked of it
        assert process.poll() is None


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


BODIES: list[tuple[object, int, str]] = [
    (b"{", 400, "the body is not JSON: "),
    (b"", 400, "the body is not JSON: "),
    (b'{"prompt": [5], "temperature": NaN}', 400, "the body is not JSON: "),
    (b'{"prompt": [5], "temperature": Infinity}', 400, "the body is not JSON: "),
    (b'{"prompt": [5], "temperature": 1e999}', 400, "the body is not JSON: "),
    (b'{"prompt": [5], "top_k": 1' + b"0" * 400 + b"}", 400, "the body is not JSON: "),
    (b'{"prompt": "\\ud800"}', 400, "the body is not JSON: "),
    (b'{"prompt": "\xed\xa0\x80"}', 400, "the body is not JSON: "),
    (b'{"prompt": ' + nested(100_000) + b"}", 400, "the body is not JSON: "),
    (b'{"prompt": [5], "model": ' + nested(1000) + b"}", 404, "the model [[["),
    (b" " * 17_000_000, 413, "the body exceeds 16777216 bytes"),
    ([], 400, "the body must be a JSON object"),
]

REFUSED: list[tuple[Json, str]] = [
    ({"model": "tiny"}, "prompt is missing"),
    (ask(None), "prompt is missing"),
    (ask([]), "prompt must be a text, a list of token ids, or a list of either, not empty"),
    (ask(""), "prompt has no tokens"),
    (ask([[5], []]), "prompt must be"),
    (ask([5, "t6"]), "prompt must be"),
    (ask([[5], 6]), "prompt must be"),
    (ask([True]), "prompt must be"),
    (ask([5.0]), "prompt must be"),
    (ask({"5": 6}), "prompt must be"),
    (ask([5, 512]), "token id 512 is out of range: the vocabulary has 512"),
    (ask([[5], [-1]]), "token id -1 is out of range"),
    (ask([2**64]), "prompt must be"),
    (ask(prompt(690)), "690 prompt tokens + max_tokens 20 = 710 exceeds the maximum model length 700"),
    (ask(prompt(650)), "650 prompt tokens + max_tokens 20 = 670 exceeds the KV cache of 640 tokens"),
    (ask([[5]] * 41), "41 sequences in one request; at most 40 may be unfinished at once"),
    (ask([5], max_completion_tokens=4), "max_completion_tokens = 4 is not supported"),
    (ask([5], echo=True), "echo = True is not supported by this server"),
    (ask([5], best_of=2), "best_of = 2 is not supported"),
    (ask([5], best_of=True), "best_of = True is not supported"),
    (ask([5], echo=0), "echo = 0 is not supported"),
    (ask([5], suffix="t6"), "suffix = 't6' is not supported"),
    (ask([5], logprobs=True), "logprobs = True must be an integer"),
    (ask([5], logprobs=21), "logprobs = 21 must be at most 20"),
    (ask([5], logprobs=-1), "logprobs = -1 must be at least 0"),
    (ask([5], messages=[USER]), "messages = [{'content': 't5 t6', 'role': 'user'}] is not supported"),
]

BOTH: list[tuple[Json, str]] = [
    ({"model": 5}, "the model 5 does not exist; 'tiny' is served here"),
    ({"model": "other" * 50}, "does not exist; 'tiny' is served here"),
    ({"surprise": 1}, "surprise = 1 is not supported by this server"),
    ({"max_tokens": 0}, "max_tokens = 0 must be at least 1"),
    ({"max_tokens": "4"}, "max_tokens = '4' must be an integer"),
    ({"max_tokens": True}, "max_tokens = True must be an integer"),
    ({"max_tokens": 2**63}, "max_tokens 9223372036854775808 = "),
    ({"max_tokens": 2**70}, "max_tokens = 1.1805916207174113e+21 must be an integer"),
    ({"temperature": -1}, "temperature = -1 must be at least 0"),
    ({"temperature": "hot"}, "temperature = 'hot' must be a number"),
    ({"top_p": 1.5}, "top_p = 1.5 must be at most 1"),
    ({"top_p": 0}, "top_p = 0 must be above 0"),
    ({"top_k": 1.5}, "top_k = 1.5 must be an integer"),
    ({"top_k": -2}, "top_k = -2 must be at least -1"),
    ({"min_p": 1.01}, "min_p = 1.01 must be at most 1"),
    ({"min_p": -0.1}, "min_p = -0.1 must be at least 0"),
    ({"repetition_penalty": 0}, "repetition_penalty = 0 must be above 0"),
    ({"presence_penalty": 2.5}, "presence_penalty = 2.5 must be at most 2"),
    ({"frequency_penalty": -2.5}, "frequency_penalty = -2.5 must be at least -2"),
    ({"seed": 2**63}, "seed = 9223372036854775808 must be below 9223372036854775808"),
    ({"seed": 1.5}, "seed = 1.5 must be an integer"),
    ({"n": 0}, "n = 0 must be at least 1"),
    ({"n": 129}, "n = 129 must be at most 128"),
    ({"n": 128}, "128 sequences in one request; at most 40 may be unfinished at once"),
    ({"stop": ""}, "stop.0 = '' must not be empty"),
    ({"stop": ["t6", ""]}, "stop.1 = '' must not be empty"),
    ({"stop": ["t6"] * 17}, "must have at most 16 entries"),
    ({"stop": 5}, "stop = 5 must be a list"),
    ({"stop": [5]}, "stop.0 = 5 must be a text"),
    ({"stop_token_ids": [5, 512]}, "stop_token_ids: 512 is out of range: the vocabulary has 512"),
    ({"stop_token_ids": [-1]}, "stop_token_ids: -1 is out of range"),
    ({"stop_token_ids": ["a"] * 100_000}, "stop_token_ids.0 = 'a' must be an integer"),
    ({"stop_token_ids": 5}, "stop_token_ids = 5 must be a list"),
    ({"ignore_eos": 1}, "ignore_eos = 1 must be true or false"),
    ({"skip_special_tokens": "no"}, "skip_special_tokens = 'no' must be true or false"),
    ({"return_token_ids": 0}, "return_token_ids = 0 must be true or false"),
    ({"prompt_logprobs": 21}, "prompt_logprobs = 21 must be at most 20"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs needs stream false"),
    ({"stream": "yes"}, "stream = 'yes' must be true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options needs stream true"),
    ({"stream": True, "stream_options": []}, "stream_options = [] must be an object"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x = 1 is not supported"),
    ({"min_tokens": 2}, "min_tokens = 2 is not supported"),
    ({"logit_bias": {"5": 1}}, "logit_bias = {'5': 1} is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format = {'type': 'json_object'} is not supported"),
    ({"include_stop_str_in_output": True}, "include_stop_str_in_output = True is not supported"),
]


def message(**fields: object) -> Json:
    return {"messages": [USER, USER | fields]}


def image() -> list[Json]:
    return [{"type": "text", "text": "t5"}, {"type": "image_url", "image_url": {"url": "data:,"}}]


CHATS: list[tuple[Json, str]] = [
    ({"messages": None}, "messages is missing"),
    ({"messages": []}, "messages = [] must not be empty"),
    ({"messages": "t5"}, "messages = 't5' must be a list"),
    ({"messages": [5]}, "messages.0 = 5 must be an object"),
    ({"messages": [{}] * 100_000}, "messages.0.role is missing"),
    (message(role="boss"), "messages.1.role = 'boss' must be 'system', 'developer', 'user', 'assistant' or 'tool'"),
    (message(role=None), "messages.1.role is missing"),
    (message(content=None), "messages.1.content is missing"),
    (message(content=5), "messages.1.content = 5 must be a text"),
    (message(content=image()), "must be a text, or parts of type text"),
    (message(content=[{"type": "text"}]), "messages.1.content = [{'type': 'text'}] must be a text, or parts"),
    (message(content=["t5"]), "messages.1.content = ['t5'] must be a text, or parts of type text"),
    (message(tool_calls=[{}]), "messages.1.tool_calls = [{}] is not supported"),
    (message(**{f"x{i}": 1 for i in range(50_000)}), "messages.1.x0 = 1 is not supported"),
    (message(content="t5 " * 700), "708 prompt tokens + max_tokens 1 = 709 exceeds the maximum model length 700"),
    ({"prompt": [5]}, "prompt = [5] is not supported"),
    ({"tools": [{"type": "function"}]}, "tools = [{'type': 'function'}] is not supported"),
    ({"tool_choice": "required"}, "tool_choice = 'required' is not supported"),
    ({"continue_final_message": True}, "continue_final_message = True is not supported"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs = [] must be an object"),
    ({"chat_template_kwargs": {"messages": []}}, "the chat template refuses these messages: "),
    ({"logprobs": 1}, "logprobs = 1 must be true or false"),
    ({"top_logprobs": 2}, "top_logprobs needs logprobs true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs = 21 must be at most 20"),
    ({"max_completion_tokens": 0}, "max_completion_tokens = 0 must be at least 1"),
    (
        {"max_completion_tokens": 699},
        "6 prompt tokens + max_completion_tokens 699 = 705 exceeds the maximum model length 700",
    ),
]


def refuse(port: int, target: str, body: object, expected: str) -> tuple[int, Json]:
    status, content = call(port, "POST", target, body)
    error: Json = json.loads(content)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert expected in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 300
    assert error["code"] == status
    assert error["type"] == ("NotFoundError" if status == 404 else "BadRequestError")
    return status, error


@pytest.mark.parametrize(("body", "status", "expected"), BODIES)
def test_bodies(port: int, body: object, status: int, expected: str) -> None:
    for target in (COMPLETIONS, CHAT):
        assert refuse(port, target, body, expected)[0] == status


def test_a_deep_value(port: int) -> None:
    body = b'{"prompt": [5], "surprise": ' + nested(1000) + b"}"
    assert refuse(port, COMPLETIONS, body, "surprise = [[[[[[[...]]]]]]] is not supported")[0] == 400


def check_fields(port: int, target: str, body: Json, expected: str) -> None:
    status, error = refuse(port, target, body, expected)
    assert status == (404 if error["param"] == "model" else 400)
    assert error["param"] is None or error["param"] in body


@pytest.mark.parametrize(("body", "expected"), REFUSED)
def test_completions(port: int, body: Json, expected: str) -> None:
    check_fields(port, COMPLETIONS, body | {"prompt": body.get("prompt")}, expected)


@pytest.mark.parametrize(("body", "expected"), CHATS)
def test_chats(port: int, body: Json, expected: str) -> None:
    check_fields(port, CHAT, {"messages": [USER], "max_tokens": None} | body, expected)


@pytest.mark.parametrize(("fields", "expected"), BOTH)
def test_in_both_dialects(port: int, fields: Json, expected: str) -> None:
    check_fields(port, COMPLETIONS, ask([5]) | fields, expected)
    check_fields(port, CHAT, {"messages": [USER], "max_tokens": 4} | fields, expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 5e-324},
        {"temperature": 1e308},
        {"temperature": 1, "top_p": 5e-324},
        {"temperature": 1, "top_k": 2**64 - 1},
        {"temperature": 1, "min_p": 1},
        {"temperature": 1, "seed": 2**63 - 1, "n": 3},
        {"seed": -(2**63)},
        {"repetition_penalty": 5e-324},
        {"temperature": 1, "repetition_penalty": 1e308, "presence_penalty": 2, "frequency_penalty": -2},
    ],
)
def test_the_ends_of_the_ranges_are_served(port: int, fields: Json) -> None:
    answer = complete(port, ask([5, 6], max_tokens=4, logprobs=20) | fields)
    assert answer["usage"]["completion_tokens"] == 4 * fields.get("n", 1)


def test_fields_that_change_nothing_are_accepted(port: int) -> None:
    fields: Json = {"n": 1, "echo": False, "logprobs": None, "stop": [], "presence_penalty": 0.0, "user": "me"}
    fields |= {
        "stream_options": {"include_usage": None},
        "logit_bias": {},
        "best_of": 1,
        "length_penalty": 1.0,
        "surprise": None,
    }
    assert complete(port, ask([5], **fields))["usage"]["completion_tokens"] == 20
    spoken = {"role": "assistant", "content": "t7", "refusal": None, "tool_calls": None}  # as answers are sent back
    chat = {"messages": [USER, spoken, USER], "tools": [], "tool_choice": "auto", "max_tokens": 2}
    assert complete(port, chat, CHAT)["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_methods(port: int, method: str) -> None:
    for target in (COMPLETIONS, CHAT, "/reset_prefix_cache"):
        status, content = call(port, method, target)
        assert status == 405 == json.loads(content)["error"]["code"]


@pytest.mark.parametrize("target", ["/none", "/v1", "/%ED%A0%80", "/%ff", "/v1/models/other", "/v1/models/%ED%A0%80"])
def test_unknown_routes_and_models(port: int, target: str) -> None:
    status, content = call(port, "GET", target)
    assert status == 404 == json.loads(content)["error"]["code"]
    assert json.loads(content)["error"]["type"] == "NotFoundError"


def test_encoded_bodies(port: int) -> None:
    def send(body: bytes) -> tuple[int, bytes]:
        return call(port, "POST", COMPLETIONS, body, {"Content-Encoding": "gzip"})

    assert send(gzip.compress(json.dumps(ask([5])).encode()))[0] == 200
    assert send(gzip.compress(b" " * 20_000_000))[0] == 413
    status, content = send(b"no gzip")
    assert (status, json.loads(content)["error"]["message"]) == (400, "the body is not encoded as its headers say")


def test_a_connection_goes_on_after_a_refusal(port: int) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.connect()
        socket_there: socket.socket = connection.sock
        for body, expected in ((b"{", 400), (json.dumps(ask([5])).encode(), 200), (b"[]", 400)):
            connection.request("POST", COMPLETIONS, body)
            with connection.getresponse() as response:
                assert response.status == expected
                response.read()
            assert connection.sock is socket_there
