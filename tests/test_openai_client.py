"""The official `openai` client, unmodified, against the engine's server."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from server_kit import metrics, offline, prompt, running, small, text_of, until

QUEUE = 8
TOKENS = prompt(9)
KEY = "sk-test"
PLAIN = {"ignore_eos": True, "return_token_ids": True}  # beyond OpenAI's fields


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("openai"))


@pytest.fixture(scope="module")
def output(path: Path) -> list[int]:
    return offline(path, TOKENS, 20)


@pytest.fixture(scope="module")
def port(path: Path) -> Iterator[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STACKRACE_TEST_KEY", KEY)
        with running(path, api_key_env="STACKRACE_TEST_KEY", max_num_queued_reqs=QUEUE) as (process, port):
            yield port
            assert process.poll() is None


@pytest.fixture
def client(port: int) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        yield client


def test_completions(client: OpenAI, output: list[int]) -> None:
    answer = client.completions.create(model="tiny", prompt=TOKENS, max_tokens=20, temperature=0, extra_body=PLAIN)
    (choice,) = answer.choices
    assert (answer.object, answer.model, choice.index) == ("text_completion", "tiny", 0)
    assert choice.text == text_of(output)
    assert (choice.finish_reason, choice.logprobs) == ("length", None)
    assert choice.model_extra is not None
    assert choice.model_extra["token_ids"] == output
    assert choice.model_extra["prompt_token_ids"] == TOKENS
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (9, 20, 29)


def test_completions_of_texts(client: OpenAI, output: list[int]) -> None:
    texts = ["t5 t6", text_of(TOKENS)]
    answer = client.completions.create(model="tiny", prompt=texts, max_tokens=4, n=2, temperature=0, extra_body=PLAIN)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices[2:]] == [text_of(output[:4])] * 2


def test_streamed_completions(client: OpenAI, output: list[int]) -> None:
    stream = client.completions.create(
        model="tiny",
        prompt=TOKENS,
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=PLAIN,
    )
    with stream:
        *chunks, last = stream
    assert "".join(chunk.choices[0].text for chunk in chunks) == text_of(output)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 20
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens == 0


def test_chat(client: OpenAI) -> None:
    first = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "t8"}, {"role": "user", "content": "t9"}],
        max_completion_tokens=8,
        seed=3,
        n=2,
        extra_body=PLAIN,
    )
    assert [choice.index for choice in first.choices] == [0, 1]
    assert first.choices[0].message.content != first.choices[1].message.content
    said = first.choices[0].message
    assert said.role == "assistant"
    assert said.content is not None
    second = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "t9"}]},
            said,
            {"role": "user", "content": "t7"},
        ],
        max_completion_tokens=2,
        extra_body=PLAIN,
    )
    words = [int(word[1:]) for word in said.content.split()]
    assert second.model_extra is not None
    assert second.model_extra["prompt_token_ids"] == [1, 5, 9, 2, 6, *words, 2, 5, 7, 2, 6]


def test_streamed_chat(client: OpenAI) -> None:
    fields = {"model": "tiny", "messages": [{"role": "user", "content": "t9"}], "seed": 1, "max_tokens": 12}
    whole = client.chat.completions.create(**fields, extra_body=PLAIN)
    stream = client.chat.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}, extra_body=PLAIN
    )
    with stream:
        *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert (last.choices, last.usage) == ([], whole.usage)


def test_the_clients_own_accumulation(client: OpenAI) -> None:
    fields = {"model": "tiny", "messages": [{"role": "user", "content": "t9"}], "seed": 1, "max_tokens": 12}
    whole = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2, extra_body=PLAIN)
    with (
        client.chat.completions.stream(**fields, logprobs=True, top_logprobs=2, extra_body=PLAIN) as stream,
        pytest.raises(openai.LengthFinishReasonError) as found,  # as it calls an answer of full length
    ):
        stream.get_final_completion()
    final = found.value.completion
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].logprobs is not None
    assert whole.choices[0].logprobs is not None
    assert final.choices[0].logprobs.content == whole.choices[0].logprobs.content


def test_logprobs(client: OpenAI, output: list[int]) -> None:
    answer = client.completions.create(
        model="tiny", prompt=TOKENS, max_tokens=5, temperature=0, logprobs=2, extra_body=PLAIN
    )
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.tokens == [f"t{token}" for token in output[:5]]
    assert told.token_logprobs == [max(tops.values()) for tops in told.top_logprobs or []]  # greedy
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "t9"}],
        max_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        extra_body=PLAIN,
    )
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content
    assert content is not None
    assert [len(entry.top_logprobs) for entry in content] == [3] * 5
    assert "".join(f" {entry.token}" for entry in content) == chat.choices[0].message.content
    assert all(entry.logprob <= 0 and bytes(entry.bytes or []).decode() == entry.token for entry in content)


def test_stop(client: OpenAI, output: list[int]) -> None:
    text = text_of(output)
    answer = client.completions.create(
        model="tiny", prompt=TOKENS, max_tokens=20, temperature=0, stop=["never", text[7:12]], extra_body=PLAIN
    )
    assert answer.choices[0].text == text[: text.index(text[7:12])]
    assert answer.choices[0].finish_reason == "stop"


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.object) == ("tiny", "model")
    assert client.models.retrieve("tiny") == model


def test_errors(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"temperature = -1\.0 must be at least 0") as found:
        client.completions.create(model="tiny", prompt=TOKENS, temperature=-1.0)
    assert (found.value.status_code, found.value.param, found.value.type) == (400, "temperature", "BadRequestError")
    with pytest.raises(openai.BadRequestError, match="parts of type text"):
        image = {"type": "image_url", "image_url": {"url": "data:,"}}
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [image]}])
    with pytest.raises(openai.BadRequestError, match="exceeds the maximum model length 700"):
        client.completions.create(model="tiny", prompt=prompt(701), stream=True)
    with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist") as missing:
        client.completions.create(model="gpt-4", prompt=TOKENS)
    assert missing.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="t5")
    with pytest.raises(openai.AuthenticationError, match="API key"):
        client.with_options(api_key="wrong").models.list()


def test_a_full_queue_and_its_retries(client: OpenAI, port: int) -> None:
    fields = {"model": "tiny", "prompt": TOKENS, "extra_body": PLAIN}
    before = metrics(port)["admission_rejections_total"]
    with client.completions.create(**fields, n=QUEUE, max_tokens=50, stream=True) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as found:
            client.completions.create(**fields)
        assert found.value.response.headers["Retry-After"] == "1"
        patient = client.with_options(max_retries=3)
        assert len(patient.completions.create(**fields, max_tokens=2).choices) == 1
    assert metrics(port)["admission_rejections_total"] >= before + 2


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_leaving_a_stream_frees_its_pages(client: OpenAI, port: int, kind: str) -> None:
    before = metrics(port)["generation_tokens_total"]
    if kind == "chat":
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "t9"}], max_tokens=620, stream=True, extra_body=PLAIN
        )
    else:
        stream = client.completions.create(model="tiny", prompt=TOKENS, max_tokens=620, stream=True, extra_body=PLAIN)
    next(iter(stream))
    assert metrics(port)["kv_cache_usage_perc"] > 0
    stream.close()
    until(lambda: metrics(port)["kv_cache_usage_perc"] == 0)
    assert metrics(port)["generation_tokens_total"] < before + 620


def test_async(port: int, output: list[int]) -> None:
    async def talk() -> None:
        async with AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=30
        ) as client:
            fields = {"model": "tiny", "prompt": TOKENS, "max_tokens": 20, "temperature": 0, "extra_body": PLAIN}
            answers = await asyncio.gather(*(client.completions.create(**fields) for _ in range(3)))
            assert [answer.choices[0].text for answer in answers] == [text_of(output)] * 3
            async with await client.completions.create(**fields, stream=True) as stream:
                assert "".join([chunk.choices[0].text async for chunk in stream]) == text_of(output)
            assert [model.id async for model in client.models.list()] == ["tiny"]
            with pytest.raises(openai.BadRequestError, match="n = 0"):
                await client.completions.create(**fields, n=0)
            await leave(client)

    async def leave(client: AsyncOpenAI) -> None:
        """Cancel a task that waits for a whole answer."""
        before = metrics(port)["generation_tokens_total"]
        call = client.completions.create(model="tiny", prompt=TOKENS, max_tokens=620, extra_body=PLAIN)
        task = asyncio.ensure_future(call)
        while metrics(port)["kv_cache_usage_perc"] == 0:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        until(lambda: metrics(port)["kv_cache_usage_perc"] == 0)
        assert metrics(port)["generation_tokens_total"] < before + 620

    asyncio.run(talk())


def test_a_server_that_ends_amid_a_stream(path: Path) -> None:
    with (
        running(path) as (process, port),
        OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=30) as client,
        client.completions.create(model="tiny", prompt=TOKENS, max_tokens=620, stream=True, extra_body=PLAIN) as stream,
    ):
        chunks = iter(stream)
        next(chunks)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(chunks)
