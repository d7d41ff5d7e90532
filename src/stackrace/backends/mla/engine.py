"""The engine: a step is schedule, run, postprocess."""

import json
from collections.abc import Callable
from collections.abc import Sequence as Many
from pathlib import Path
from typing import NamedTuple

import torch

from stackrace.backends import checkpoint as checkpoints
from stackrace.backends.mla import cache, weights
from stackrace.backends.mla.config import end_tokens, parse
from stackrace.backends.mla.model import Model
from stackrace.backends.mla.pages import PagePool
from stackrace.backends.mla.runner import Runner, Sampled
from stackrace.backends.mla.scheduler import Scheduler, Work
from stackrace.backends.mla.sequence import Sequence, TokenLogprobs
from stackrace.harness.clock import SECOND, now
from stackrace.harness.errors import UsageError

SHORTEST = 4  # tokens of prompt and output that a server must be able to hold
MAX_LOGPROBS = 20  # likeliest tokens that may be told of a position, as vLLM


class TokenEvent(NamedTuple):
    """One output token of one request; the last one says why it ended."""

    id: str
    token: int
    finish_reason: str | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None  # with the first token, where wanted
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    admitted: int = 0  # when its first step began, ns of the clock


class Step(NamedTuple):
    """What one step did, and how long it took."""

    start: int  # ns of the clock
    seconds: float
    phase: str  # prefill, decode or mixed
    num_sequences: int
    num_tokens: int  # computed
    num_kv_tokens: int  # attended to: the contexts of all its sequences


class Stats(NamedTuple):
    """Gauges, and counters since the start (`total_`)."""

    num_running: int
    num_waiting: int
    num_pages: int
    kv_cache_usage: float  # share of pages that somebody holds
    total_preemptions: int
    total_prefix_queries: int  # tokens looked for in the prefix cache
    total_prefix_hits: int  # and found there


class Settings(NamedTuple):
    """How an engine is built, by vLLM's names."""

    checkpoint: Path
    attention: str  # mla caches latents, mha every head's keys and values, gqa those of a model without latents
    dtype: str  # float32 or bfloat16; float64 for judging kernels
    device: str
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    kv_cache_memory_bytes: int
    enable_prefix_caching: bool


class Engine:
    """Requests in, token events out; not thread-safe, steps when told."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.observers: list[Callable[[Step], object]] = []  # told of each step

    @property
    def stats(self) -> Stats:
        """The state between two steps."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        return Stats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_pages=pool.num_pages,
            kv_cache_usage=(pool.num_pages - pool.num_free) / pool.num_pages,
            total_preemptions=scheduler.num_preemptions,
            total_prefix_queries=scheduler.num_queried,
            total_prefix_hits=scheduler.num_found,
        )

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not (self.scheduler.running or self.scheduler.waiting)

    def submit(self, sequence: Sequence) -> None:
        """Queue a request that fits (see Limits)."""
        self.scheduler.submit(sequence)

    def abort(self, id: str) -> None:
        """Drop a request and free its pages; no event follows."""
        self.scheduler.abort(id)

    def reset_prefix_cache(self) -> None:
        """Forget what full pages hold; of a request that still runs, pages that fill up from now on are found again."""
        self.scheduler.pool.reset()

    def step(self) -> list[TokenEvent]:
        """One forward pass over the scheduled work; events in the order of the batch."""
        start = now()
        work = self.scheduler.schedule()
        if not work:
            return []
        for sequence, _ in work:
            sequence.admitted = sequence.admitted or start
        sampled = self.runner.run(work)
        step = _describe(work, start)
        self.scheduler.computed(work)
        events = [self._append(item) for item in sampled]
        for observe in self.observers:
            observe(step)
        return events

    def _append(self, sampled: Sampled) -> TokenEvent:
        sequence, token, logprobs = sampled
        told = sequence.take_prompt_logprobs()
        sequence.tokens.append(token)
        reason = sequence.finish_reason()
        if reason:
            self.scheduler.finish(sequence)
        return TokenEvent(sequence.id, token, reason, logprobs, told, sequence.num_cached or 0, sequence.admitted)


def _describe(work: Many[Work], start: int) -> Step:
    """The step that has just run over `work`."""
    decoding = [item.sequence.num_output > 0 and item.sequence.num_uncomputed == 1 for item in work]
    return Step(
        start=start,
        seconds=(now() - start) / SECOND,
        phase="decode" if all(decoding) else "mixed" if any(decoding) else "prefill",
        num_sequences=len(work),
        num_tokens=sum(count for _, count in work),
        num_kv_tokens=sum(sequence.num_computed + count for sequence, count in work),
    )


class Limits(NamedTuple):
    """What a request may ask of an engine."""

    vocab_size: int
    max_model_len: int
    max_cached_tokens: int  # what the whole page pool holds
    eos_tokens: frozenset[int]


def limits(settings: Settings, checkpoint: checkpoints.Checkpoint) -> Limits:
    """Known before anything large is loaded. UsageError: settings that contradict each other or the model."""
    config = parse(checkpoint.config)
    if settings.max_model_len > config.max_positions:
        asked, most = settings.max_model_len, config.max_positions
        raise UsageError(f"--max-model-len {asked} exceeds max_position_embeddings {most}; lower it")
    if settings.max_model_len < SHORTEST:
        raise UsageError(f"--max-model-len {settings.max_model_len} is below {SHORTEST}; raise it")
    if not 0 < settings.max_num_seqs <= settings.max_num_batched_tokens:
        asked, least = settings.max_num_batched_tokens, settings.max_num_seqs
        raise UsageError(f"--max-num-batched-tokens {asked} is below --max-num-seqs {least}; raise it")
    num_pages = _num_pages(settings, checkpoint)
    if not num_pages:
        given = settings.kv_cache_memory_bytes
        raise UsageError(f"--kv-cache-memory-bytes {given} is under a page of {cache.PAGE} tokens; raise it")
    eos_tokens = config.eos_tokens | _generation_eos(checkpoint.path)
    return Limits(config.vocab_size, settings.max_model_len, num_pages * cache.PAGE, eos_tokens)


def _generation_eos(folder: Path) -> frozenset[int]:
    """End-of-text tokens that generation_config.json adds, as chat models need them."""
    path = folder / "generation_config.json"
    return end_tokens(json.loads(path.read_bytes()).get("eos_token_id") if path.exists() else None)


def _num_pages(settings: Settings, checkpoint: checkpoints.Checkpoint) -> int:
    dtype: torch.dtype = getattr(torch, settings.dtype)
    token_bytes = cache.token_bytes(parse(checkpoint.config), settings.attention, dtype)
    return settings.kv_cache_memory_bytes // (cache.PAGE * token_bytes)


def build(settings: Settings, checkpoint: checkpoints.Checkpoint) -> Engine:
    """Load the weights and allocate the pages."""
    config = parse(checkpoint.config)
    dtype, device = getattr(torch, settings.dtype), torch.device(settings.device)
    model = Model(config, settings.attention, settings.max_model_len, dtype, device)
    weights.load(checkpoint, model.destinations())
    num_pages = _num_pages(settings, checkpoint)
    pages = cache.allocate(config, settings.attention, num_pages, dtype, device)
    scheduler = Scheduler(
        PagePool(num_pages),
        settings.max_num_seqs,
        settings.max_num_batched_tokens,
        settings.enable_prefix_caching,
    )
    return Engine(scheduler, Runner(model, pages, device))
