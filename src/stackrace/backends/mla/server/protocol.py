"""OpenAI's dialect: what may be asked, what is refused and in which words."""

import reprlib
import secrets
from collections.abc import Sequence as Many
from typing import Annotated, Any, Literal, Self, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError, model_validator

from stackrace.backends.mla.engine import MAX_LOGPROBS, Limits
from stackrace.backends.mla.sequence import Sampling, Sequence
from stackrace.backends.mla.server.refusal import Refusal, first_fault

Json = dict[str, Any]

NEUTRAL: dict[str, tuple[Any, ...]] = {  # not implemented, and the values with which they change nothing
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "spaces_between_special_tokens": (True,),
    "priority": (0,),
    "continue_final_message": (False,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
}
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "request_id"}
IGNORED |= {"parallel_tool_calls"}
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Top = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
_Stop = Annotated[str, Field(min_length=1)]


def _as_list(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


class _Strict(BaseModel):
    """Types are taken at their word, unknown fields refused, NaN and infinity too; null is as good as absent."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, fields: object) -> object:
        """Of many unknown fields only the first: each error takes its time."""
        if not isinstance(fields, dict):
            return fields
        given = {name: value for name, value in fields.items() if value is not None}
        for name in [name for name in given if name not in cls.model_fields][1:]:
            del given[name]
        return given


class StreamOptions(_Strict):
    """When a stream tells its token counts."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Ask(_Strict):
    """What both dialects may ask; names and defaults are OpenAI's, or vLLM's where OpenAI has none."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = Field(default_factory=lambda: secrets.randbits(62))
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stop: Annotated[list[_Stop], FailFast(), BeforeValidator(_as_list), Field(max_length=16)] = []
    stop_token_ids: Annotated[list[int], FailFast()] = []
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: _Top | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens told beside each output token; None: nothing is told."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _fits_a_stream(self) -> Self:
        if not self.stream and self.stream_options != StreamOptions():
            raise Refusal(400, "stream_options needs stream true", "stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise Refusal(400, "prompt_logprobs needs stream false", "prompt_logprobs")
        return self

    def sampling(self, index: int) -> Sampling:
        """Of the choice `index`: each has a seed of its own."""
        return Sampling(
            seed=self.seed + index,
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )


class CompletionAsk(Ask):
    """POST /v1/completions."""

    prompt: Any
    logprobs: _Top | None = None
    add_special_tokens: bool = True

    @property
    def num_logprobs(self) -> int | None:
        """As many as `logprobs` says."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """One text or list of ids, or a list of either: always as a list. Refusal for anything else."""
        prompt = self.prompt
        if isinstance(prompt, str) or _is_ids(prompt):
            return [prompt]
        if isinstance(prompt, list) and prompt and all(isinstance(p, str) or _is_ids(p) for p in prompt):
            return prompt
        raise Refusal(400, "prompt must be a text, a list of token ids, or a list of either, not empty", "prompt")


def _is_ids(prompt: object) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)


def _join_parts(content: object) -> object:
    """The text of a message that is given in parts."""
    if not isinstance(content, list):
        return content
    parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    if len(texts) < len(content):
        raise ValueError("must be a text, or parts of type text")
    return "".join(texts)


class Message(_Strict):
    """One turn of a conversation; `content` may come as parts of type text."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_join_parts)]
    name: str | None = None


class ChatAsk(Ask):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], FailFast(), Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: _Top = 0
    add_special_tokens: bool = False
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _tells_tops(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs true", "top_logprobs")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """`top_logprobs`, where `logprobs` asks for any."""
        return self.top_logprobs if self.logprobs else None


A = TypeVar("A", bound=Ask)


def parse(body: bytes, kind: type[A], served: str) -> A:
    """The request in `body`. Refusal says what is wrong with it, with the value and the limit."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise Refusal(400, "the body must be a JSON object")
    asked = fields.get("model") or served
    if asked != served:
        raise Refusal(404, f"the model {reprlib.repr(asked)} does not exist; {served!r} is served here", "model")
    relevant = {name: value for name, value in fields.items() if _matters(name, value)}
    try:
        return kind.model_validate(relevant)
    except ValidationError as error:
        raise first_fault(error) from None


def _matters(name: str, value: object) -> bool:
    neutral = [one for one in NEUTRAL.get(name, ()) if isinstance(one, bool) == isinstance(value, bool)]
    return name not in IGNORED and value not in neutral


def check_prompt(prompt: Many[int], vocab_size: int) -> None:
    """Refusal unless it has tokens and all of them exist."""
    if not prompt:
        raise Refusal(400, "prompt has no tokens", "prompt")
    for token in (min(prompt), max(prompt)):
        if not 0 <= token < vocab_size:
            raise Refusal(400, f"token id {token} is out of range: the vocabulary has {vocab_size}", "prompt")


def output_limit(ask: Ask, num_prompt: int, limits: Limits) -> int:
    """The most output tokens a prompt may get: 16, or what is left, unless asked. Refusal if it does not fit."""
    left = min(limits.max_model_len - num_prompt, limits.max_cached_tokens - num_prompt + 1)
    asked, name = ask.max_tokens, "max_tokens"
    if isinstance(ask, ChatAsk):
        if ask.max_completion_tokens:
            asked, name = ask.max_completion_tokens, "max_completion_tokens"
        asked = asked or max(left, 1)
    asked = asked or 16
    sum_ = f"{num_prompt} prompt tokens + {name} {asked} = {num_prompt + asked}"
    if num_prompt + asked > limits.max_model_len:
        raise Refusal(400, f"{sum_} exceeds the maximum model length {limits.max_model_len}", name)
    if asked > left:
        raise Refusal(400, f"{sum_} exceeds the KV cache of {limits.max_cached_tokens} tokens", name)
    return asked


def sequences(ask: Ask, prompts: Many[list[int]], id: str, limits: Limits) -> list[Sequence]:
    """`n` for each prompt, in the order of their choices. Refusal for a prompt that cannot be served."""
    for token in ask.stop_token_ids:
        if not 0 <= token < limits.vocab_size:
            message = f"stop_token_ids: {token} is out of range: the vocabulary has {limits.vocab_size}"
            raise Refusal(400, message, "stop_token_ids")
    stop_tokens = frozenset(ask.stop_token_ids) | (frozenset() if ask.ignore_eos else limits.eos_tokens)
    found: list[Sequence] = []
    for prompt in prompts:
        check_prompt(prompt, limits.vocab_size)
        most = output_limit(ask, len(prompt), limits)
        found += [
            Sequence(
                id=f"{id}-{len(found) + index}",
                prompt=prompt,
                max_tokens=most,
                sampling=ask.sampling(index),
                stop_tokens=stop_tokens,
                num_logprobs=ask.num_logprobs,
                num_prompt_logprobs=None if index else ask.prompt_logprobs,  # once is enough
            )
            for index in range(ask.n)
        ]
    return found
