"""Our engine as a stack."""

import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import stackrace
from stackrace.backends.architectures import kv_widths
from stackrace.backends.base import Backend, bearer, check_variables, flags, source_hash
from stackrace.backends.checkpoint import Checkpoint
from stackrace.backends.gauges import VLLM_GAUGES, Names
from stackrace.backends.running import Placement
from stackrace.harness.errors import UsageError, require

KINDS = ("mla", "mha", "gqa")
COUNTS = ("max_num_seqs", "max_num_batched_tokens", "max_num_queued_reqs", "max_model_len", "kv_cache_memory_bytes")
_SOURCE = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class MLA(Backend):
    """`attention` says what the cache holds: `mla` latents, `mha` the keys and values they expand to, `gqa` those of a
    model without latents.
    """

    attention: str
    dtype: str
    device: str
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_queued_reqs: int
    kv_cache_memory_bytes: int
    enable_prefix_caching: bool
    host: str
    api_key_env: str | None
    shutdown_timeout: float
    step_events: bool

    reset_path: ClassVar[str | None] = "/reset_prefix_cache"

    def __post_init__(self) -> None:
        require("backend.attention", self.attention, str, lambda v: v in KINDS, "mla, mha or gqa")
        require("backend.dtype", self.dtype, str, lambda v: v in ("float32", "bfloat16"), "float32 or bfloat16")
        for name in COUNTS:
            require(f"backend.{name}", getattr(self, name), int, lambda v: v > 0, "a whole number above 0")
        for name in ("enable_prefix_caching", "step_events"):
            require(f"backend.{name}", getattr(self, name), bool, lambda v: True, "true or false")
        seconds = self.shutdown_timeout
        require("backend.shutdown_timeout", seconds, (int, float), lambda v: v >= 0, "a number of seconds")
        if seconds >= self.stop_grace:
            limit = f"backend.stop_grace={self.stop_grace:g}"
            raise UsageError(f"backend.shutdown_timeout={seconds:g}: must be below {limit}, after which it is killed")

    def check(self) -> None:
        """The key's variable is set, if one is named."""
        super().check()
        check_variables([self.api_key_env])

    def check_weights(self, weights: Checkpoint) -> None:
        """The cache can hold what this model leaves in it."""
        kinds = kv_widths(weights.config)
        if self.attention not in kinds:
            wanted = " or ".join(kinds)
            raise UsageError(f"backend.attention={self.attention}: {weights.config['model_type']} takes {wanted}")

    def headers(self) -> dict[str, str]:
        """The key as a bearer token."""
        return bearer(self.api_key_env)

    def command(self, at: Placement) -> list[str]:
        """The server, one torch thread a core."""
        options: dict[str, str | int | float | bool | None] = {
            "checkpoint": str(Path(str(self.checkpoint)).resolve()),
            "served_model_name": self.model,
            "host": self.host,
            "port": at.port,
            "api_key_env": self.api_key_env,
            "threads": len(at.cores),
            "attention": self.attention,
            "dtype": self.dtype,
            "device": self.device,
            "enable_prefix_caching": self.enable_prefix_caching,
            "shutdown_timeout": self.shutdown_timeout,
            "step_events": str(at.folder / "steps.jsonl") if self.step_events else None,
            **{name: getattr(self, name) for name in COUNTS},
        }
        return [sys.executable, "-m", "stackrace.backends.mla.server", *flags(options)]

    def gauges(self) -> Names:
        """Under vLLM's names."""
        return VLLM_GAUGES

    def uses_gpu(self) -> bool:
        """Unless it computes on the CPU."""
        return self.device != "cpu"

    def version(self) -> str:
        """Ours, with a hash of the engine's and the kernels' sources, and torch's."""
        parts = ("backends/mla", "kernels", "harness/tokenizer.py")
        sources = source_hash(*(_SOURCE / part for part in parts))
        return f"stackrace {stackrace.__version__}+{sources}, torch {version('torch')}"
