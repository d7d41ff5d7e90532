"""The nouns that every other module speaks; imports nothing of this project."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Sampling:
    """How output tokens are drawn. Always sent in full, or a model's generation_config would decide."""

    temperature: float
    top_p: float
    top_k: int  # 0: no limit
    seed: int


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the workload asks it."""

    id: int
    prompt: tuple[int, ...]  # token ids
    output_tokens: int
    sampling: Sampling
    due: float | None = None  # seconds after the start, where the workload itself knows (a trace)
    session: int | None = None  # requests of one session are asked one after the other, in the order of their turns
    turn: int | None = None  # from 0
    think: float = 0.0  # seconds from the end of the turn before until this one is due
    messages: tuple[tuple[str, str], ...] | None = None  # (role, content): asked as a chat; `prompt` is what it becomes


Arrival = Callable[[np.random.Generator], Iterator[float]]
"""A seeded process: yields due times in seconds after the start, without end, never decreasing."""


class Workload(Protocol):
    """What is asked."""

    def requests(self, rng: np.random.Generator) -> Iterator[Request]:
        """Requests without end (or until a data set is exhausted), ids counting from 0."""
        ...


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an engine listens. `headers` may hold secrets: it never reaches the disk."""

    url: str
    model: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    extra_body: Mapping[str, object] = field(default_factory=dict)  # fields that this dialect wants besides OpenAI's
    omit: tuple[str, ...] = ()  # fields that this dialect refuses
    omit_in_chat: tuple[str, ...] = ()  # and those that it refuses in chats
    pid: int | None = None

    def scrub(self, text: str) -> str:
        """`text` without the values of the headers, in case a server repeats them."""
        for value in self.headers.values():
            for secret in (value, value.removeprefix("Bearer ")):
                text = text.replace(secret, "***") if secret else text
        return text


@dataclass(slots=True)
class Record:
    """What happened to one request, raw. Times are nanoseconds of CLOCK_MONOTONIC after the start of the run."""

    id: int
    due: int  # when the schedule wanted it sent; closed loop: when its slot came free
    slot: int  # when the concurrency cap let it go
    sent: int | None = None  # first send()
    body_sent: int | None = None  # last byte handed to the kernel
    chunk_times: list[int] = field(default_factory=list)  # one an event that carried tokens
    chunk_tokens: list[int] = field(default_factory=list)
    chunk_lateness: list[int] | None = None  # user-space stamp - kernel's, which chunk_times then are: the client's own
    chunk_coalesced: list[bool] = field(default_factory=list)  # it came in one read with a later one, and has its time
    output_ids: list[int] | None = None  # where the server tells
    end: int | None = None  # last byte, or when it was given up
    prompt_tokens: int | None = None  # as the server counted
    output_tokens: int | None = None
    cached_tokens: int | None = None
    token_source: str | None = None  # usage, ids or text: what chunk_tokens was read from
    reconnected: int = 0  # resets before any response byte, retried with the due time kept
    censored: bool = False  # still in flight at the cutoff
    error: str | None = None
