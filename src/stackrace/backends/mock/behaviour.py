"""Everything that can be set of the mock."""

from dataclasses import dataclass

from stackrace.harness.errors import UsageError, require

TRANSFERS = ("chunked", "length", "close")

_SECONDS = ("ttft", "gap", "stall", "head_delay", "freeze")
_SHARES = ("jitter", "stall_share", "error_share", "cut_share", "malformed_share", "split_share")
_SWITCHES = ("in_step", "record_truth")


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What the mock does to every request; seconds and shares."""

    ttft: float  # first event after the request arrived, or after its place came free
    prompt_rate: float | None  # tokens per second of a prefill that comes on top of ttft
    gap: float  # between sends of events
    tokens_per_event: int
    events_per_write: int  # that many events leave in one send
    in_step: bool  # every event leaves at a multiple of `gap` on the clock
    jitter: float  # each gap is stretched or shrunk by up to this share, evenly distributed
    max_num_seqs: int | None  # served at a time; the others wait, first come first served
    stall_share: float  # share of requests that pause once, in their middle
    stall: float
    error_share: float  # share of requests answered with `error_status`
    error_status: int
    cut_share: float  # share of requests whose connection breaks in their middle
    malformed_share: float  # share of requests with one more event, in their middle, that is not JSON
    split_share: float  # share of sends that are cut in two at a random byte
    head_delay: float  # from the first byte of the response's head to its last
    transfer: str  # how the end of a stream is told: chunked, length or close
    freeze_after: float | None  # seconds from the first streamed request until nothing is sent or read
    freeze: float  # for so long
    template_tokens: int  # what a chat counts besides the words of its messages
    record_truth: bool
    seed: int

    def __post_init__(self) -> None:
        number, share, switch = "a number of seconds", "a share from 0 to 1", "true or false"
        for name in _SECONDS:
            require(f"backend.{name}", getattr(self, name), (int, float), lambda v: v >= 0, number)
        for name in _SHARES:
            require(f"backend.{name}", getattr(self, name), (int, float), lambda v: 0 <= v <= 1, share)
        for name in _SWITCHES:
            require(f"backend.{name}", getattr(self, name), bool, lambda v: True, switch)
        self._check_counts()
        self._check_optional()
        require("backend.transfer", self.transfer, str, lambda v: v in TRANSFERS, "chunked, length or close")
        if self.in_step and not self.gap:
            raise UsageError("backend.in_step=True: needs a backend.gap above 0, the time of a step")

    def _check_counts(self) -> None:
        for name in ("tokens_per_event", "events_per_write"):
            require(f"backend.{name}", getattr(self, name), int, lambda v: v > 0, "a whole number above 0")
        status, template = self.error_status, self.template_tokens
        require("backend.error_status", status, int, lambda v: 400 <= v < 600, "an HTTP status from 400 to 599")
        require("backend.template_tokens", template, int, lambda v: v >= 0, "a whole number, 0 or more")
        require("backend.seed", self.seed, int, lambda v: True, "a whole number")

    def _check_optional(self) -> None:
        if self.prompt_rate is not None:
            wanted = "a number of tokens per second above 0, or null"
            require("backend.prompt_rate", self.prompt_rate, (int, float), lambda v: v > 0, wanted)
        if self.max_num_seqs is not None:
            require("backend.max_num_seqs", self.max_num_seqs, int, lambda v: v > 0, "a whole number above 0, or null")
        if self.freeze_after is not None:
            wanted = "a number of seconds, or null"
            require("backend.freeze_after", self.freeze_after, (int, float), lambda v: v >= 0, wanted)
