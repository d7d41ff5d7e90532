"""The wire, outbound: a request's bytes. Pure; no sockets, no clock."""

from typing import Any
from urllib.parse import urlsplit

import orjson

from stackrace.harness.types import Endpoint, Request


def request_bytes(endpoint: Endpoint, request: Request) -> bytes:
    """POST …/v1/completions as HTTP/1.1: streamed, the prompt as token ids, usage with every event.

    A request with messages goes to …/v1/chat/completions instead.
    """
    target, asked = _asked(request)
    body: dict[str, Any] = {
        "model": endpoint.model,
        **asked,
        "max_tokens": request.output_tokens,
        "temperature": request.sampling.temperature,
        "top_p": request.sampling.top_p,
        "top_k": request.sampling.top_k,
        "seed": request.sampling.seed,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        **endpoint.extra_body,
    }
    refused = endpoint.omit if request.messages is None else (*endpoint.omit, *endpoint.omit_in_chat)
    content = orjson.dumps({k: v for k, v in body.items() if k not in refused})
    url = urlsplit(endpoint.url)
    headers = {
        "Host": url.netloc,
        "Content-Type": "application/json",
        "Accept": "text/event-stream",
        "Content-Length": str(len(content)),
        **endpoint.headers,
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {url.path.rstrip('/')}/v1/{target} HTTP/1.1\r\n{head}\r\n".encode() + content


def _asked(request: Request) -> tuple[str, dict[str, Any]]:
    if request.messages is None:
        return "completions", {"prompt": request.prompt}
    messages = [{"role": role, "content": content} for role, content in request.messages]
    return "chat/completions", {"messages": messages}
