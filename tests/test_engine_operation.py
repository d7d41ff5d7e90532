"""The engine's server as an operator meets it: keys, a full queue, the prefix cache, metrics and the log of steps."""

import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_kit import PAGES, Json, ask, call, complete, metrics, offline, prompt, running, small, streaming, until

from stackrace.backends.mla.server.metrics import COUNTERS, GAUGES, HISTOGRAMS

KEY = "Schlüssel 1"
HEADERS = {"Authorization": f"Bearer {KEY}".encode().decode("latin-1")}  # http.client sends latin-1
QUEUE = 3
TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}{{ 't8' if deep }}"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = small(tmp_path_factory.mktemp("operation"))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("steps") / "steps.jsonl"


@pytest.fixture(scope="module")
def port(path: Path, steps: Path) -> Iterator[int]:
    options = {"api_key_env": "STACKRACE_TEST_KEY", "max_num_queued_reqs": QUEUE, "step_events": steps}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STACKRACE_TEST_KEY", KEY)
        with running(path, enable_prefix_caching=True, **options) as (process, port):
            yield port
            assert process.poll() is None


def served(port: int, body: Json) -> Json:
    return complete(port, body, headers=HEADERS)


def reset(port: int) -> None:
    assert call(port, "POST", "/reset_prefix_cache", b"", HEADERS)[0] == 200


def grown(before: dict[str, float], port: int) -> dict[str, float]:
    """How much each metric has grown, once nothing runs."""
    until(lambda: metrics(port)["num_requests_running"] + metrics(port)["num_requests_waiting"] == 0)
    return {name: value - before[name] for name, value in metrics(port).items()}


@pytest.mark.parametrize(
    "given", [None, "", KEY, "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer \xff"]
)
@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny"),
        ("POST", "/reset_prefix_cache"),
        ("GET", "/%761/models"),
    ],
)
def test_without_the_key(port: int, method: str, target: str, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    status, content = call(port, method, target, b"{}" if method == "POST" else None, headers)
    error = json.loads(content)["error"]
    assert (status, error["code"], error["type"]) == (401, 401, "AuthenticationError")
    assert "API key" in error["message"]
    assert "Schl" not in error["message"]


def test_with_the_key(port: int) -> None:
    assert served(port, ask([5]))["usage"]["completion_tokens"] == 20
    assert call(port, "GET", "/v1/models", headers=HEADERS)[0] == 200
    for target in ("/health", "/metrics", "/version"):
        assert call(port, "GET", target)[0] == 200


def test_a_full_queue(port: int) -> None:
    before = metrics(port)
    with streaming(port, ask([5], n=QUEUE, max_tokens=200), HEADERS) as response:
        assert response.readline().startswith(b"data: ")
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(ask([5])), HEADERS)
            with connection.getresponse() as refused:
                error = json.loads(refused.read())["error"]
                assert (refused.status, error["code"], error["type"]) == (429, 429, "RateLimitError")
                assert int(refused.headers["Retry-After"]) >= 1
                assert error["message"].startswith("3 of 3 sequences are unfinished")
        assert response.read().endswith(b"data: [DONE]\n\n")  # the others are not disturbed
    assert served(port, ask([5], n=QUEUE))["usage"]["completion_tokens"] == 20 * QUEUE
    assert call(port, "POST", "/v1/completions", ask([5], n=QUEUE + 1), HEADERS)[0] == 400  # would never fit
    assert grown(before, port)["admission_rejections_total"] == 1


def test_leaving_makes_room(port: int) -> None:
    with streaming(port, ask([5], n=QUEUE, max_tokens=200), HEADERS) as response:
        assert response.readline().startswith(b"data: ")
    until(lambda: call(port, "POST", "/v1/completions", ask([5], n=QUEUE), HEADERS)[0] == 200)


def test_prefix_cache(path: Path, port: int) -> None:
    reset(port)
    before = metrics(port)
    expected = offline(path, prompt(200), 20)
    for cached in (0, 192, 192):  # of 200 tokens three full pages
        answer = served(port, ask(prompt(200), return_token_ids=True))
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": cached}
        assert answer["choices"][0]["token_ids"] == expected
    reset(port)
    assert served(port, ask(prompt(200)))["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    change = grown(before, port)
    assert (change["prefix_cache_queries_total"], change["prefix_cache_hits_total"]) == (4 * 200, 2 * 192)
    assert change["iteration_tokens_total_sum"] == 4 * (200 + 19) - 2 * 192


def test_prompts_whose_logprobs_are_told_are_computed(port: int) -> None:
    reset(port)
    answers = [served(port, ask(prompt(150), prompt_logprobs=1)) for _ in range(2)]
    assert [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers] == [0, 0]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_a_template_in_a_file_of_its_own(port: int) -> None:
    def body(role: str) -> Json:
        return {"messages": [{"role": role, "content": "t9"}], "max_tokens": 1, "return_token_ids": True}

    deep = {"chat_template_kwargs": {"deep": True}}
    for fields, expected in (({}, [9, 2]), (deep, [9, 2, 8])):
        answer = complete(port, body("user") | fields, "/v1/chat/completions", HEADERS)
        assert answer["prompt_token_ids"] == expected
    status, content = call(port, "POST", "/v1/chat/completions", body("system"), HEADERS)
    error = json.loads(content)["error"]
    assert (status, error["param"]) == (400, "messages")
    assert "no system turns" in error["message"]


def test_every_metric_is_there(port: int) -> None:
    text = call(port, "GET", "/metrics")[1].decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    kinds = {"histogram": HISTOGRAMS, "gauge": GAUGES, "counter": COUNTERS}
    for kind, names in kinds.items():
        for name in names:
            assert families[f"vllm:{name}"].type == kind
            assert {"model_name": "tiny", "engine": "0"}.items() <= families[f"vllm:{name}"].samples[0].labels.items()
    for name in ("prompt_tokens", "generation_tokens", "request_success", "admission_rejections"):
        assert families[f"vllm:{name}"].type == "counter"
    cache = families["vllm:cache_config_info"].samples[0].labels
    assert (cache["block_size"], int(cache["num_gpu_blocks"])) == ("64", PAGES)


def test_metrics_are_what_happened(port: int) -> None:
    reset(port)
    before = metrics(port)
    stop = served(port, ask([5, 6], max_tokens=7, return_token_ids=True))["choices"][0]["token_ids"][3]
    served(port, ask([5, 6, 7], max_tokens=7, n=2))
    used = served(port, ask([5, 6], max_tokens=7, stop_token_ids=[stop]))["usage"]["completion_tokens"]
    change = grown(before, port)
    output = 3 * 7 + used
    assert change["request_success_total"] == 4
    assert change["prompt_tokens_total"] == change["request_prompt_tokens_sum"] == 2 + 2 * 3 + 2
    assert change["generation_tokens_total"] == change["request_generation_tokens_sum"] == output
    assert change["iteration_tokens_total_sum"] == 10 + output - 4  # nobody computes the last token of an answer
    assert change["inter_token_latency_seconds_count"] == output - 4
    once = [name for name in HISTOGRAMS if name not in ("inter_token_latency_seconds", "iteration_tokens_total")]
    assert {name: change[f"{name}_count"] for name in once} == dict.fromkeys(once, 4)
    queue, prefill, decode = (change[f"request_{part}_time_seconds_sum"] for part in ("queue", "prefill", "decode"))
    assert min(queue, prefill, decode) > 0
    sums = {"time_to_first_token_seconds": queue + prefill, "request_inference_time_seconds": prefill + decode}
    sums |= {"e2e_request_latency_seconds": queue + prefill + decode, "inter_token_latency_seconds": decode}
    for name, expected in sums.items():
        assert change[f"{name}_sum"] == pytest.approx(expected, rel=1e-6)


def test_log_of_steps(port: int, steps: Path) -> None:
    reset(port)
    before = metrics(port)
    lines = steps.read_bytes().count(b"\n")
    used = served(port, ask([prompt(5), prompt(100)], max_tokens=9))["usage"]
    change = grown(before, port)
    found = [json.loads(line) for line in steps.read_text().splitlines()[lines:]]
    assert len(found) == change["iteration_tokens_total_count"]
    tokens = used["prompt_tokens"] + used["completion_tokens"] - 2
    assert sum(step["num_tokens"] for step in found) == tokens == change["iteration_tokens_total_sum"]
    for step in found:
        assert step.keys() == {"start", "ms", "phase", "num_sequences", "num_tokens", "num_kv_tokens"}
        assert step["phase"] in ("prefill", "mixed", "decode")
        assert 0 < step["num_sequences"] <= step["num_tokens"] <= 64
        assert step["num_tokens"] <= step["num_kv_tokens"]
        assert step["ms"] > 0
    decoding = [step for step in found if step["phase"] == "decode"]
    assert all(step["num_tokens"] == step["num_sequences"] for step in decoding)
    ends = [step["start"] + 1e6 * step["ms"] for step in found]
    assert all(end <= step["start"] + 1 for end, step in zip(ends, found[1:], strict=False))
