"""OpenAI's completions dialect: what is accepted, what is refused and in which words, what is answered."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson

from stackrace.backends.mla.engine import Limits
from stackrace.harness.types import Sampling

Json = dict[str, Any]
T = TypeVar("T")
N = TypeVar("N", int, float)

NEUTRAL: dict[str, tuple[Any, ...]] = {  # not implemented, and the values with which they change nothing
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (),
    "prompt_logprobs": (),
    "suffix": ("",),
    "stop": ([], ""),
    "stop_token_ids": ([],),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "add_special_tokens": (True,),
    "skip_special_tokens": (True,),
}
KNOWN = {"model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "user"}
KNOWN |= {"ignore_eos", "stream", "stream_options", "return_token_ids"}
STREAM_OPTIONS = {"include_usage", "continuous_usage_stats"}


class BadRequest(Exception):
    """A request that is refused: what to answer."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
        kind = "NotFoundError" if status == 404 else "BadRequestError"
        self.body = error_body(message, kind, param, status)


def error_body(message: str, kind: str, param: str | None, status: int) -> bytes:
    """OpenAI's error object."""
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}})


@dataclass(frozen=True, slots=True)
class Completion:
    """A request that was found sound."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    ignore_eos: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool


def parse(body: bytes, model: str, limits: Limits, encode: Callable[[str], list[int]]) -> Completion:
    """The request in `body`. BadRequest says what is wrong with it, with the value and the limit."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BadRequest("the body must be a JSON object")
    fields = {name: value for name, value in fields.items() if value is not None}
    _check_names(fields, model)
    options = _typed(fields, "stream_options", dict, {})
    for name in options.keys() - STREAM_OPTIONS:
        raise BadRequest(f"stream_options.{name} is not supported", "stream_options")
    completion = Completion(
        prompt=_prompt(fields.get("prompt"), limits.vocab_size, encode),
        max_tokens=_number(fields, "max_tokens", int, 16, 1, None),
        sampling=_sampling(fields),
        ignore_eos=_typed(fields, "ignore_eos", bool, False),
        stream=_typed(fields, "stream", bool, False),
        include_usage=_typed(options, "include_usage", bool, False),
        continuous_usage=_typed(options, "continuous_usage_stats", bool, False),
        return_token_ids=_typed(fields, "return_token_ids", bool, False),
    )
    if options and not completion.stream:
        raise BadRequest("stream_options needs stream true", "stream_options")
    _check_length(completion, limits)
    return completion


def _check_names(fields: Mapping[str, Any], model: str) -> None:
    asked = fields.get("model", model)
    if asked != model:
        raise BadRequest(f"the model {asked!r} does not exist; {model!r} is served here", "model", 404)
    for name, value in fields.items():
        if name in KNOWN or value in NEUTRAL.get(name, ()):
            continue
        raise BadRequest(f"{name} = {value!r} is not supported by this server", name)


def _check_length(completion: Completion, limits: Limits) -> None:
    prompt, output = len(completion.prompt), completion.max_tokens
    asked = f"{prompt} prompt tokens + max_tokens {output} = {prompt + output}"
    if prompt + output > limits.max_model_len:
        raise BadRequest(f"{asked} exceeds the maximum model length {limits.max_model_len}", "max_tokens")
    if prompt + output - 1 > limits.max_cached_tokens:
        raise BadRequest(f"{asked} exceeds the KV cache of {limits.max_cached_tokens} tokens", "max_tokens")


def _prompt(prompt: object, vocab_size: int, encode: Callable[[str], list[int]]) -> list[int]:
    """Token ids from ids, a text, or a list with one of either."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        prompt = encode(prompt)
    if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
        raise BadRequest("prompt must be one text or one list of token ids", "prompt")
    if not prompt:
        raise BadRequest("prompt has no tokens", "prompt")
    for token in (min(prompt), max(prompt)):
        if not 0 <= token < vocab_size:
            raise BadRequest(f"token id {token} is out of range: the vocabulary has {vocab_size}", "prompt")
    return prompt


def _sampling(fields: Json) -> Sampling:
    top_p = _number(fields, "top_p", float, 1.0, 0.0, 1.0)
    if top_p == 0:
        raise BadRequest("top_p = 0 must be above 0", "top_p")
    return Sampling(
        temperature=_number(fields, "temperature", float, 1.0, 0.0, None),
        top_p=top_p,
        top_k=max(_number(fields, "top_k", int, 0, -1, None), 0),
        seed=_number(fields, "seed", int, secrets.randbits(63), None, None),
    )


def _typed(fields: Json, name: str, kind: type[T], default: T) -> T:
    value = fields.get(name, default)
    if type(value) is not kind:
        raise BadRequest(f"{name} = {value!r} must be {_NAMES[kind]}", name)
    return value


def _number(fields: Json, name: str, kind: type[N], default: N, least: N | None, most: N | None) -> N:
    value = fields.get(name, default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise BadRequest(f"{name} = {value!r} must be {_NAMES[kind]}", name)
    if least is not None and value < least:
        raise BadRequest(f"{name} = {value} must be at least {least}", name)
    if most is not None and value > most:
        raise BadRequest(f"{name} = {value} must be at most {most}", name)
    return value


_NAMES: dict[type, str] = {int: "an integer", float: "a number", bool: "true or false", dict: "an object"}


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """Token counts; no prompt token ever comes from a prefix cache, for there is none."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def choice(text: str, finish_reason: str | None, token_ids: Sequence[int] | None, prompt: Sequence[int] | None) -> Json:
    """A choice of a whole or streamed answer; ids where given, in vLLM's fields."""
    fields: Json = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
    if prompt is not None:
        fields["prompt_token_ids"] = prompt
    if token_ids is not None:
        fields["token_ids"] = token_ids
    return fields
