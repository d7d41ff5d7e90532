"""What a running stack answers: asked over HTTP, many questions at once, as a race would ask."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from stackrace.harness.errors import StackraceError
from stackrace.harness.types import Endpoint
from stackrace.harness.verify.naming import Names
from stackrace.harness.verify.questions import Questions
from stackrace.harness.verify.settings import Settings

Told = dict[int, float]  # token -> log-probability
IMPOSSIBLE = -9999.0  # what stands for log 0, and for no number
_QUOTED = 200  # characters of a refusal


class NoAnswer(StackraceError):
    """A stack does not answer what it must to be judged; one line."""


class BadAnswer(NoAnswer):
    """It fails when it is asked, as nothing that works does: a 5xx, a broken connection, no answer in time."""


@dataclass(frozen=True, slots=True)
class Answers:
    """The likeliest tokens after each prefix; each greedy output, and the likeliest tokens at each of its steps."""

    prefixes: list[Told]
    outputs: list[list[int]]
    steps: list[list[Told]]


def ask(endpoint: Endpoint, questions: Questions, settings: Settings, names: Names) -> Answers:
    """All answers. Raises NoAnswer if a question is refused, or the answer tells no log-probabilities."""
    import aiohttp  # a fifth of a second that most sweeps' points need not wait for

    try:
        return asyncio.run(asyncio.wait_for(_ask(endpoint, questions, settings, names), settings.timeout))
    except TimeoutError:
        raise BadAnswer(f"no answer within verify.timeout={settings.timeout:g} s") from None
    except (aiohttp.ClientError, OSError) as e:
        raise BadAnswer(endpoint.scrub(f"{type(e).__name__}: {e}")) from None


async def _ask(endpoint: Endpoint, questions: Questions, settings: Settings, names: Names) -> Answers:
    """Greedy prompts first, so that they decode while prefixes are read."""
    import aiohttp

    free = asyncio.Semaphore(settings.concurrency)
    asked = [(prompt, questions.greedy_tokens) for prompt in questions.prompts]
    asked += [(prefix, 1) for prefix in questions.prefixes]
    url = f"{endpoint.url.rstrip('/')}/v1/completions"
    limits = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(headers=dict(endpoint.headers), timeout=limits) as session:

        async def one(prompt: Sequence[int], tokens: int) -> dict[str, Any]:
            async with free, session.post(url, json=_body(endpoint, prompt, tokens, questions.logprobs)) as response:
                return _choice(response.status, await response.read(), endpoint)

        choices = await asyncio.gather(*(one(*question) for question in asked))
    greedy, prefixes = choices[: len(questions.prompts)], choices[len(questions.prompts) :]
    return Answers(
        prefixes=[_told(choice, names)[0] for choice in prefixes],
        outputs=[_tokens(choice, names, questions.greedy_tokens) for choice in greedy],
        steps=[_told(choice, names) for choice in greedy],
    )


def _body(endpoint: Endpoint, prompt: Sequence[int], tokens: int, logprobs: int) -> dict[str, Any]:
    fields = {
        "model": endpoint.model,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "logprobs": logprobs,
        "ignore_eos": True,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "stream": False,
        **endpoint.extra_body,
    }
    return {name: value for name, value in fields.items() if name not in endpoint.omit}


def _choice(status: int, content: bytes, endpoint: Endpoint) -> dict[str, Any]:
    said = endpoint.scrub(content.decode(errors="replace"))[:_QUOTED]
    if status != 200:
        raise (BadAnswer if status >= 500 else NoAnswer)(f"HTTP {status}: {said}")
    try:
        answer = orjson.loads(content)
        choice: dict[str, Any] = answer["choices"][0]
    except (ValueError, KeyError, IndexError, TypeError):
        raise NoAnswer(f"not a completion: {said}") from None
    return choice


def _told(choice: dict[str, Any], names: Names) -> list[Told]:
    """The likeliest tokens at each position."""
    tops = (choice.get("logprobs") or {}).get("top_logprobs") or []
    told = [_by_id(top or {}, names) for top in tops]
    if not told or not all(told):
        raise NoAnswer("it tells no log-probabilities of tokens that the checkpoint's tokenizer knows")
    return told


def _by_id(top: dict[str, float | None], names: Names) -> Told:
    """Names that several tokens share are passed over."""
    named = {names.id(name): value for name, value in top.items()}
    return {token: _number(value) for token, value in named.items() if token is not None}


def _number(value: float | None) -> float:
    return IMPOSSIBLE if value is None or not math.isfinite(value) else max(value, IMPOSSIBLE)


def _tokens(choice: dict[str, Any], names: Names, number: int) -> list[int]:
    """By their ids, where told; else by their names; else by the text."""
    told: list[int | None] = list(choice.get("token_ids") or [])
    told = told or [names.id(name) for name in (choice.get("logprobs") or {}).get("tokens") or []]
    found = [token for token in told if token is not None]
    if len(found) < len(told) or not told:
        found = names.ids(choice.get("text") or "")
    if len(found) != number:
        raise NoAnswer(f"{number} tokens were asked for, {len(found)} can be told from its answer")
    return found
