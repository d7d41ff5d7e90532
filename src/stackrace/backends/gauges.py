"""What engines call their gauges and counters at /metrics: common name -> Prometheus name without labels.

`requests_running`, `requests_waiting`, `kv_cache_usage` (a share) and `kv_cache_capacity` (tokens) are gauges;
`preemptions`, `prefix_cache_queries`, `prefix_cache_hits`, `prompt_tokens` and `generation_tokens` (the last four in
tokens) count since the engine's start.
"""

from collections.abc import Mapping
from typing import NamedTuple


class InLabels(NamedTuple):
    """A number that stands in the labels of a series whose value is always 1."""

    name: str  # of the series
    labels: tuple[tuple[str, ...], ...]  # the product of these; where they are not all there, of the next ones


Names = Mapping[str, str | InLabels]

VLLM_CACHE = InLabels("vllm:cache_config_info", (("kv_cache_size_tokens",), ("num_gpu_blocks", "block_size")))
VLLM_GAUGES: Names = {  # vllm/v1/metrics/loggers.py; ours bears the same names
    "requests_running": "vllm:num_requests_running",
    "requests_waiting": "vllm:num_requests_waiting",
    "kv_cache_usage": "vllm:kv_cache_usage_perc",
    "kv_cache_capacity": VLLM_CACHE,
    "preemptions": "vllm:num_preemptions_total",
    "prefix_cache_queries": "vllm:prefix_cache_queries_total",
    "prefix_cache_hits": "vllm:prefix_cache_hits_total",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "generation_tokens": "vllm:generation_tokens_total",
}
SGLANG_GAUGES: Names = {  # sglang/srt/observability/metrics_collector.py; needs --enable-metrics
    # no requests_running: sglang:num_running_reqs leaves out what was prefilled in up to 40 decode steps before
    "requests_waiting": "sglang:num_queue_reqs",
    "kv_cache_usage": "sglang:token_usage",
    "kv_cache_capacity": "sglang:max_total_num_tokens",
    "preemptions": "sglang:num_retracted_requests_total",
    "prefix_cache_queries": "sglang:prompt_tokens_total",  # each prompt token is looked for
    "prefix_cache_hits": "sglang:cached_tokens_total",  # not there before the first hit
    "prompt_tokens": "sglang:prompt_tokens_total",
    "generation_tokens": "sglang:generation_tokens_total",
}
