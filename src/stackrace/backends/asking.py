"""Short questions to an endpoint, outside of any race: is there a token, what is broken, is the cache empty."""

import http.client
import json
import urllib.error
import urllib.request

from stackrace.harness.errors import EngineError
from stackrace.harness.types import Endpoint

_SHORTEST, _LONGEST = 0.1, 10  # seconds that an answer is waited for
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # nor does the load generator know one


def has_token(endpoint: Endpoint, timeout: float) -> bool:
    """Whether the endpoint answers a short prompt with a token within `timeout` seconds.

    Raises EngineError if it answers that it never will (a 4xx other than 408 and 429).
    """
    try:
        return _brought_token(_complete(endpoint, timeout))
    except urllib.error.HTTPError as e:
        if 400 <= e.code < 500 and e.code not in (408, 429):
            said = endpoint.scrub(e.read().decode(errors="replace")[:300])
            raise EngineError(f"{endpoint.url} refuses a plain completion: HTTP {e.code}: {said}") from None
        return False
    except (OSError, ValueError, http.client.HTTPException):
        return False


def refused(endpoint: Endpoint, path: str) -> str | None:
    """What an empty POST to `path` was refused with; None if it was done."""
    request = urllib.request.Request(f"{endpoint.url.rstrip('/')}{path}", b"", dict(endpoint.headers))
    try:
        with NO_PROXY.open(request, timeout=_LONGEST) as response:
            said = response.read().decode(errors="replace")
    except urllib.error.HTTPError as e:
        return f"POST {path}: HTTP {e.code}: {e.read().decode(errors='replace')[:300]}"
    except (OSError, http.client.HTTPException) as e:
        return f"POST {path}: {type(e).__name__}: {e}"
    return f"POST {path}: {said[:300]}" if _says_false(said) else None


def _says_false(said: str) -> bool:
    """vLLM answers 200 either way, with `success` in JSON; SGLang's text is no JSON."""
    try:
        answer = json.loads(said)
    except ValueError:
        return False
    return isinstance(answer, dict) and answer.get("success") is False


def fault_of(endpoint: Endpoint, timeout: float) -> str | None:
    """What a short prompt meets with that no working engine answers, however busy; None otherwise.

    That is a 5xx other than 503, or a connection that is refused or breaks. To be late is no fault.
    """
    try:
        _complete(endpoint, timeout)
    except urllib.error.HTTPError as e:
        said = endpoint.scrub(e.read().decode(errors="replace")[:300])
        return f"HTTP {e.code}: {said}" if e.code >= 500 and e.code != 503 else None
    except (OSError, http.client.HTTPException) as e:
        cause = e.reason if isinstance(e, urllib.error.URLError) else e
        return None if isinstance(cause, TimeoutError) else f"{type(cause).__name__}: {cause}"
    except ValueError:
        return None
    return None


def _complete(endpoint: Endpoint, timeout: float) -> object:
    """What a short prompt is answered with, unstreamed."""
    body = {"model": endpoint.model, "prompt": [4, 5], "max_tokens": 1, "temperature": 0, **endpoint.extra_body}
    content = json.dumps({k: v for k, v in body.items() if k not in endpoint.omit}).encode()
    headers = {"Content-Type": "application/json", **endpoint.headers}
    request = urllib.request.Request(f"{endpoint.url.rstrip('/')}/v1/completions", content, headers)
    with NO_PROXY.open(request, timeout=max(timeout, _SHORTEST)) as response:
        answer: object = json.load(response)
        return answer


def _brought_token(answer: object) -> bool:
    """By its usage, else by its text."""
    if not isinstance(answer, dict) or not answer.get("choices"):
        return False
    tokens = (answer.get("usage") or {}).get("completion_tokens")
    return bool(answer["choices"][0].get("text") if tokens is None else tokens)
