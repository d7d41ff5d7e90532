"""What a request asks."""

from dataclasses import dataclass
from typing import Any

import orjson

_MAX_TOKENS = 16  # OpenAI's, where the request does not say


@dataclass(frozen=True, slots=True)
class Question:
    """A completion or a chat, as far as the mock cares."""

    is_chat: bool
    is_streamed: bool
    tokens: int  # to answer with
    prompt_tokens: int
    seed: int | None  # identifies it in the truth


def read(body: bytes, is_chat: bool, template_tokens: int) -> Question:
    """The question in a request's body. Raises ValueError, in words for the client."""
    ask = orjson.loads(body)
    if not isinstance(ask, dict):
        raise ValueError("the body must be an object")
    tokens = ask.get("max_completion_tokens") or ask.get("max_tokens") or _MAX_TOKENS
    if not isinstance(tokens, int) or tokens < 1:
        raise ValueError("max_tokens must be a whole number above 0")
    prompt_tokens = template_tokens + _words_of(ask.get("messages")) if is_chat else _length(ask.get("prompt"))
    return Question(is_chat, bool(ask.get("stream")), tokens, prompt_tokens, ask.get("seed"))


def _length(prompt: Any) -> int:
    """Tokens where they are given as ids, else words."""
    if isinstance(prompt, str):
        return len(prompt.split())
    if isinstance(prompt, list):
        return sum(map(_length, prompt)) if prompt and not isinstance(prompt[0], int) else len(prompt)
    raise ValueError("prompt must be a string or a list")


def _words_of(messages: Any) -> int:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("messages must be a list of objects")
    return sum(_words_in(m.get("content")) for m in messages)


def _words_in(content: Any) -> int:
    """A text, or parts some of which are texts."""
    if isinstance(content, list):
        return sum(_words_in(part.get("text")) for part in content if isinstance(part, dict))
    return len(content.split()) if isinstance(content, str) else 0
