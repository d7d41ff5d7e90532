"""What is answered instead of tokens, and in which words."""

import reprlib
from typing import Any

from pydantic import ValidationError

WORDS = {  # by pydantic's type of error
    "missing": "is missing",
    "extra_forbidden": "is not supported by this server",
    "bool_type": "must be true or false",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "string_type": "must be a text",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "literal_error": "must be {expected}",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "too_long": "must have at most {max_length} entries",
    "value_error": "{error}",
}
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}
ERRORS = {401: "AuthenticationError", 404: "NotFoundError", 429: "RateLimitError"}


class Refusal(Exception):
    """What is answered instead of tokens: OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = ERRORS.get(status, "BadRequestError" if status < 500 else "InternalServerError")
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": status}}


def first_fault(error: ValidationError) -> Refusal:
    """The first fault, in one line."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(map(str, fault["loc"]))
    what = WORDS[fault["type"]].format_map(fault.get("ctx", {})) if fault["type"] in WORDS else fault["msg"]
    value = "" if fault["type"] == "missing" else f" = {reprlib.repr(fault['input'])}"
    return Refusal(400, f"{where}{value} {what}", where.partition(".")[0] or None)
