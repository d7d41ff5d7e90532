"""Our engine as a stack."""

import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import stackrace
from stackrace.backends.base import Backend, flags, source_hash
from stackrace.backends.running import Placement
from stackrace.harness.errors import require

_SOURCE = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class MLA(Backend):
    """`attention: mla` caches latents and decodes absorbed; `mha` caches expanded keys and values."""

    attention: str
    dtype: str
    device: str
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_memory_bytes: int

    def __post_init__(self) -> None:
        require("backend.attention", self.attention, str, lambda v: v in ("mla", "mha"), "mla or mha")
        require("backend.dtype", self.dtype, str, lambda v: v in ("float32", "bfloat16"), "float32 or bfloat16")
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "kv_cache_memory_bytes"):
            require(f"backend.{name}", getattr(self, name), int, lambda v: v > 0, "a whole number above 0")

    def command(self, at: Placement) -> list[str]:
        """The server, one torch thread a core."""
        options: dict[str, str | int | float | bool | None] = {
            "checkpoint": str(Path(str(self.checkpoint)).resolve()),
            "served_model_name": self.model,
            "host": "127.0.0.1",
            "port": at.port,
            "threads": len(at.cores),
            "attention": self.attention,
            "dtype": self.dtype,
            "device": self.device,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "max_model_len": self.max_model_len,
            "kv_cache_memory_bytes": self.kv_cache_memory_bytes,
        }
        return [sys.executable, "-m", "stackrace.backends.mla.server", *flags(options)]

    def version(self) -> str:
        """Ours, with a hash of the engine's and the kernels' sources, and torch's."""
        sources = source_hash(_SOURCE / "backends" / "mla", _SOURCE / "kernels")
        return f"stackrace {stackrace.__version__}+{sources}, torch {version('torch')}"
