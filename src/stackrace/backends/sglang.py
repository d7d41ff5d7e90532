"""SGLang: the common settings in its own flags."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from stackrace.backends import checkpoint
from stackrace.backends.gauges import SGLANG_GAUGES, Names
from stackrace.backends.installed import Installed, Options
from stackrace.harness.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class SGLang(Installed):
    """Its OpenAI server. Source: sglang/srt/server_args.py of the versions tried."""

    launcher: str | None  # a script that starts it, where its module cannot start by itself

    packages: ClassVar[tuple[str, ...]] = ("sglang",)
    versions_tried: ClassVar[tuple[str, ...]] = ("sglang 0.5.17", "sglang 0.5.18")
    reset_path: ClassVar[str | None] = "/flush_cache"

    def check(self) -> None:
        """The launcher is there."""
        if self.launcher is not None and not Path(self.launcher).is_file():
            raise UsageError(f"backend.launcher={self.launcher}: no such file; run in a checkout of stackrace")
        super().check()

    def start_words(self) -> tuple[str, str]:
        """Its module, or the launcher."""
        if self.launcher is not None:
            return "-u", str(Path(self.launcher).resolve())
        return "-m", "sglang.launch_server"

    def environment(self) -> dict[str, str]:
        """Nothing is fetched."""
        return {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", **super().environment()}

    def gauges(self) -> Names:
        """As this engine calls them."""
        return SGLANG_GAUGES

    def options(self) -> Options:
        """The cache is told in tokens: as many as its bytes hold."""
        return {
            "model_path": str(Path(str(self.checkpoint)).resolve()),
            "context_length": self.max_model_len,
            "max_total_tokens": self._cache_tokens(),
            "max_running_requests": self.max_num_seqs,
            "chunked_prefill_size": self.max_num_batched_tokens,
            "max_prefill_tokens": self.max_num_batched_tokens,
            "tp_size": self.tensor_parallel_size,
            "disable_radix_cache": not self.enable_prefix_caching,
            "enable_metrics": True,
            "log_level_http": "warning",  # no line a request
            "enable_cache_report": True,  # tells how many tokens of a prompt came from the cache
            "sampling_defaults": "openai",  # sampling is what requests say
        }

    def _cache_tokens(self) -> int:
        found = checkpoint.check(Path(str(self.checkpoint)))
        kind = "mla" if "kv_lora_rank" in found.config else "gqa"
        # the bytes are each GPU's, which holds every latent, or its part of the heads
        parts = 1 if kind == "mla" else min(self.tensor_parallel_size, int(found.config["num_key_value_heads"]))
        return self.kv_cache_memory_bytes * parts // found.kv_bytes_per_token(kind, self.kv_bytes())
