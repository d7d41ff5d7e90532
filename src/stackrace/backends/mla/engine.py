"""The engine: a step is schedule, run, postprocess."""

from pathlib import Path
from typing import NamedTuple

import torch

from stackrace.backends import checkpoint as checkpoints
from stackrace.backends.mla import cache, weights
from stackrace.backends.mla.config import parse
from stackrace.backends.mla.model import Model
from stackrace.backends.mla.runner import Runner
from stackrace.backends.mla.scheduler import Scheduler, Sequence
from stackrace.harness.errors import UsageError


class TokenEvent(NamedTuple):
    """One output token of one request; the last one says why it ended."""

    id: str
    token: int
    finish_reason: str | None


class Stats(NamedTuple):
    """Gauges, and counters since the start (`_total`)."""

    num_requests_running: int
    num_requests_waiting: int
    kv_cache_usage_perc: float  # 0 to 1, as vLLM's
    iterations_total: int
    computed_tokens_total: int  # run through the model: prompts, and outputs fed back
    generation_tokens_total: int


class Settings(NamedTuple):
    """How an engine is built, by vLLM's names."""

    checkpoint: Path
    attention: str  # mla caches latents, mha caches every head's keys and values
    dtype: str  # float32 or bfloat16; float64 for judging kernels
    device: str
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    kv_cache_memory_bytes: int


class Engine:
    """Requests in, token events out; not thread-safe, steps when told."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._num_steps = 0
        self._num_computed = 0
        self._num_generated = 0

    @property
    def stats(self) -> Stats:
        """The state between two steps."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        return Stats(
            num_requests_running=len(scheduler.running),
            num_requests_waiting=len(scheduler.waiting),
            kv_cache_usage_perc=1 - pool.num_free / pool.num_pages,
            iterations_total=self._num_steps,
            computed_tokens_total=self._num_computed,
            generation_tokens_total=self._num_generated,
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

    def step(self) -> list[TokenEvent]:
        """One forward pass over the scheduled work; events in the order of the batch."""
        work = self.scheduler.schedule()
        if not work:
            return []
        sampled = self.runner.run(work)
        for sequence, count in work:
            sequence.num_computed += count
            self._num_computed += count
        self._num_steps += 1
        self._num_generated += len(sampled)
        return [self._append(sequence, token) for sequence, token in sampled]

    def _append(self, sequence: Sequence, token: int) -> TokenEvent:
        sequence.tokens.append(token)
        reason = sequence.finish_reason()
        if reason:
            self.scheduler.finish(sequence)
        return TokenEvent(sequence.id, token, reason)


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
    if not 0 < settings.max_num_seqs <= settings.max_num_batched_tokens:
        asked, least = settings.max_num_batched_tokens, settings.max_num_seqs
        raise UsageError(f"--max-num-batched-tokens {asked} is below --max-num-seqs {least}; raise it")
    num_pages = _num_pages(settings, checkpoint)
    if not num_pages:
        given = settings.kv_cache_memory_bytes
        raise UsageError(f"--kv-cache-memory-bytes {given} is under a page of {cache.PAGE} tokens; raise it")
    return Limits(config.vocab_size, settings.max_model_len, num_pages * cache.PAGE, config.eos_tokens)


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
    scheduler = Scheduler(cache.PagePool(num_pages), settings.max_num_seqs, settings.max_num_batched_tokens)
    return Engine(scheduler, Runner(model, pages, device))
