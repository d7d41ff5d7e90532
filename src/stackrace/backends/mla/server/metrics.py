"""Prometheus metrics under vLLM's names and buckets, so that dashboards made for vLLM show this engine as well."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stackrace.backends.mla.cache import PAGE
from stackrace.backends.mla.engine import Stats, Step, TokenEvent
from stackrace.harness.clock import SECOND, now

LABELS = ("model_name", "engine")
LATENCY = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680]
TTFT = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10]
TTFT += [20, 40, 80, 160, 640, 2560]
GAP = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
TOKENS = [digit * 10**power for power in range(6) for digit in (1, 2, 5)]
STEP_TOKENS = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]

HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("Submission to first token.", TTFT),
    "inter_token_latency_seconds": ("Token to token.", GAP),
    "request_time_per_output_token_seconds": ("First to last token, over the tokens after the first.", GAP),
    "e2e_request_latency_seconds": ("Submission to last token.", LATENCY),
    "request_queue_time_seconds": ("Submission to the first step.", LATENCY),
    "request_prefill_time_seconds": ("First step to first token.", LATENCY),
    "request_decode_time_seconds": ("First to last token.", LATENCY),
    "request_inference_time_seconds": ("First step to last token.", LATENCY),
    "request_prompt_tokens": ("Prompt tokens of a request.", TOKENS),
    "request_generation_tokens": ("Output tokens of a request.", TOKENS),
    "iteration_tokens_total": ("Tokens computed in a step.", STEP_TOKENS),
}
CACHE = ("num_gpu_blocks", "block_size")  # pages, and tokens of each; vLLM calls them so on a CPU, too
GAUGES = {
    "num_requests_running": ("Sequences that hold pages.", "num_running"),
    "num_requests_waiting": ("Sequences in the queue.", "num_waiting"),
    "kv_cache_usage_perc": ("Share of pages that somebody holds; 1 is all.", "kv_cache_usage"),
}
COUNTERS = {
    "num_preemptions": ("Sequences that lost their pages and were computed again.", "total_preemptions"),
    "prefix_cache_queries": ("Prompt tokens looked for in the prefix cache.", "total_prefix_queries"),
    "prefix_cache_hits": ("Prompt tokens found there.", "total_prefix_hits"),
}


@dataclass(slots=True)
class Timing:
    """When things happened to one sequence, as the server saw it, ns of the clock."""

    num_prompt: int
    submitted: int = field(default_factory=now)
    admitted: int = 0
    first: int = 0
    last: int = 0
    num_output: int = 0


class Metrics:
    """All series of one server."""

    def __init__(self, model: str, stats: Callable[[], Stats]) -> None:
        registry = self._registry = CollectorRegistry()
        labels = (model, "0")
        registry.register(_Engine(labels, stats))
        self._histograms = {
            name: Histogram(f"vllm:{name}", text, LABELS, buckets=buckets, registry=registry).labels(*labels)
            for name, (text, buckets) in HISTOGRAMS.items()
        }
        prompt_tokens = Counter("vllm:prompt_tokens", "Tokens of prompts that were served.", LABELS, registry=registry)
        output_tokens = Counter("vllm:generation_tokens", "Output tokens.", LABELS, registry=registry)
        success = Counter(
            "vllm:request_success", "Ended by themselves.", (*LABELS, "finished_reason"), registry=registry
        )
        rejections = Counter("vllm:admission_rejections", "Answered 429.", ("model_name", "reason"), registry=registry)
        self._prompt_tokens = prompt_tokens.labels(*labels)
        self._output_tokens = output_tokens.labels(*labels)
        self._success = {reason: success.labels(*labels, reason) for reason in ("stop", "length")}
        self.rejections = rejections.labels(model, "max_num_queued_reqs")

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)

    def step(self, step: Step) -> None:
        """A step has run."""
        self._histograms["iteration_tokens_total"].observe(step.num_tokens)

    def token(self, timing: Timing, event: TokenEvent) -> None:
        """A token has come."""
        at = now()
        timing.num_output += 1
        self._output_tokens.inc()
        if timing.first:
            self._seconds("inter_token_latency_seconds", timing.last, at)
        else:
            timing.admitted, timing.first = event.admitted, at
            self._prompt_tokens.inc(timing.num_prompt)
            self._seconds("time_to_first_token_seconds", timing.submitted, at)
            self._seconds("request_queue_time_seconds", timing.submitted, timing.admitted)
            self._seconds("request_prefill_time_seconds", timing.admitted, at)
        timing.last = at

    def end(self, timing: Timing, reason: str) -> None:
        """A sequence has ended by itself: `stop` or `length`."""
        self._success[reason].inc()
        self._seconds("e2e_request_latency_seconds", timing.submitted, timing.last)
        self._seconds("request_decode_time_seconds", timing.first, timing.last)
        self._seconds("request_inference_time_seconds", timing.admitted, timing.last)
        if timing.num_output > 1:
            mean = (timing.last - timing.first) / SECOND / (timing.num_output - 1)
            self._histograms["request_time_per_output_token_seconds"].observe(mean)
        self._histograms["request_prompt_tokens"].observe(timing.num_prompt)
        self._histograms["request_generation_tokens"].observe(timing.num_output)

    def _seconds(self, name: str, start: int, stop: int) -> None:
        self._histograms[name].observe((stop - start) / SECOND)


class _Engine(Collector):
    """The engine's own numbers, read when asked for."""

    def __init__(self, labels: tuple[str, str], stats: Callable[[], Stats]) -> None:
        self._labels = labels
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """One family a number."""
        stats = self._stats()._asdict()
        cache = GaugeMetricFamily("vllm:cache_config_info", "The cache, in its labels.", labels=(*LABELS, *CACHE))
        cache.add_metric((*self._labels, str(stats["num_pages"]), str(PAGE)), 1)
        yield cache
        for kinds, family in ((GAUGES, GaugeMetricFamily), (COUNTERS, CounterMetricFamily)):
            for name, (text, key) in kinds.items():
                metric = family(f"vllm:{name}", text, labels=LABELS)
                metric.add_metric(self._labels, stats[key])
                yield metric
