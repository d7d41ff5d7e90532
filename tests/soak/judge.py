"""Whether an answer is a valid one, and the right one."""

import json
import math
from collections.abc import Sequence

from soak.answers import Answer, Json, Seen, parse, streamed, whole
from soak.asks import Ask, Expected
from soak.fault import must
from soak.wire import Reply
from stackrace.backends.mla.cache import PAGE

CLOSE = 2e-3  # log-probabilities that rounding may move apart; weights changed by known.NOISE move them 3e-4


def check_ask(ask: Ask, reply: Reply) -> int:
    """Output tokens of a right answer; Fault for any other."""
    must(reply.status == 200, f"status {reply.status} where 200 was due")
    stream = ask.body["stream"]
    kind = "text/event-stream" if stream else "application/json"
    must(reply.headers["content-type"].startswith(kind), f"content type {reply.headers['content-type']}")
    answer = (streamed if stream else whole)(ask, reply.body)
    must(sorted(answer.choices) == list(range(len(ask.choices))), f"choices {sorted(answer.choices)}")
    for index, expected in enumerate(ask.choices):
        _choice(ask, expected, answer.choices[index])
    return _usage(ask, answer)


def check_error(reply: Reply, status: int) -> None:
    """OpenAI's error object, and when to come back."""
    must(reply.status == status, f"status {reply.status} where {status} was due")
    body = parse(reply.body)
    error = body["error"]
    must(body.keys() == {"error"} and error.keys() == {"message", "type", "param", "code"}, "not OpenAI's error object")
    must(isinstance(error["message"], str) and error["message"], "an error without a message")
    must(isinstance(error["type"], str) and error["code"] == status, f"type {error['type']}, code {error['code']}")
    must(error["param"] is None or isinstance(error["param"], str), f"param {error['param']!r}")
    if status == 429:
        must(reply.headers.get("retry-after", "").isdigit(), "a 429 without Retry-After")


def _choice(ask: Ask, expected: Expected, seen: Seen) -> None:
    where = f"choice {seen.index}:"
    must(seen.finish_reason in ("stop", "length"), f"{where} finish_reason {seen.finish_reason}")
    if expected.finish_reason:
        ends = (seen.finish_reason, seen.stop_reason), (expected.finish_reason, expected.stop_reason)
        must(ends[0] == ends[1], f"{where} ended by {ends[0]}, due was {ends[1]}")
    if expected.text is not None:
        must(seen.text == expected.text, f"{where} text {seen.text!r}, due was {expected.text!r}")
    if ask.body.get("return_token_ids"):
        _tokens(ask, expected, seen, where)
    _logprobs(ask, expected, seen, where)
    if (top := ask.body.get("prompt_logprobs")) is not None:
        prompt, likely = ask.book.prompts[expected.prompt].ids, ask.book.likely[expected.prompt]
        _prompt_logprobs(prompt, likely, seen.prompt_logprobs or [], top)


def _tokens(ask: Ask, expected: Expected, seen: Seen, where: str) -> None:
    if seen.prompt_ids is not None or not (ask.chat and ask.body["stream"]):
        must(seen.prompt_ids == ask.book.prompts[expected.prompt].ids, f"{where} prompt ids {seen.prompt_ids}")
    if expected.said:
        due = expected.said.tokens
        must(seen.tokens == due, f"{where} tokens {seen.tokens}, due were {due}")
    else:
        must(len(seen.tokens) == expected.most, f"{where} {len(seen.tokens)} tokens, due were {expected.most}")
        must(all(0 <= token < ask.book.vocab for token in seen.tokens), f"{where} unknown tokens {seen.tokens}")


def _logprobs(ask: Ask, expected: Expected, seen: Seen, where: str) -> None:
    top = ask.num_logprobs
    if top is None:
        must(not seen.likely, f"{where} logprobs that nobody asked for")
        return
    count = len(expected.said.tokens) if expected.said else expected.most
    must(len(seen.likely) == count, f"{where} logprobs of {len(seen.likely)} tokens, due were {count}")
    for number, told in enumerate(seen.likely):
        numbers = [told.logprob, *told.top.values()]
        must(all(math.isfinite(value) and value <= 0 for value in numbers), f"{where} logprobs {told}")
        must(top <= len(told.top) <= top + (not ask.chat), f"{where} {len(told.top)} likeliest, due were {top}")
        must(ask.chat or told.top[told.name] == told.logprob, f"{where} {told.name} is not in {told.top}")
        if expected.said:
            _same(ask, expected.said.tokens[number], expected.said.logprobs[number], told.name, told.logprob)


def _same(ask: Ask, token: int, logprob: float, name: str, found: float) -> None:
    by_id = ask.body.get("return_tokens_as_token_ids")
    due = f"token_id:{token}" if by_id else ask.book.tokenizer.decode([token], skip_special_tokens=False)
    must(name == due, f"logprobs of {name}, due was {due}")
    must(abs(found - logprob) < CLOSE, f"logprob {found} of {name}, due was {logprob}")


def _prompt_logprobs(prompt: Sequence[int], likely: Sequence[float], told: Sequence[Json | None], top: int) -> None:
    must(len(told) == len(prompt) and told[0] is None, f"{len(told)} prompt_logprobs, due were {len(prompt)}")
    for token, logprob, one in zip(prompt[1:], likely, told[1:], strict=True):
        must(one and str(token) in one and top <= len(one) <= top + 1, f"prompt_logprobs {one} of token {token}")
        found = (one or {})[str(token)]["logprob"]
        must(abs(found - logprob) < CLOSE, f"prompt logprob {found} of {token}, due was {logprob}")


def _usage(ask: Ask, answer: Answer) -> int:
    counts = [len(expected.said.tokens) if expected.said else expected.most for expected in ask.choices]
    usage = answer.usage
    if usage:
        due = {"prompt_tokens": ask.num_prompt, "completion_tokens": sum(counts)}
        due["total_tokens"] = sum(due.values())
        must({name: usage[name] for name in due} == due, f"usage {json.dumps(usage)}, due were {due}")
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        must(0 <= cached <= ask.num_prompt and cached % PAGE == 0, f"{cached} cached tokens of {ask.num_prompt}")
    return sum(counts)
