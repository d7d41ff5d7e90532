"""`stackrace model`: make or inspect a checkpoint."""

from importlib import resources
from pathlib import Path

import yaml

from stackrace.backends import checkpoint
from stackrace.backends.architectures import kv_widths
from stackrace.harness.errors import UsageError


def make(name: str, seed: int, out: Path | None, device: str) -> str:
    """Write the checkpoint of conf/model/<name>.yaml; returns what `inspect` says of it."""
    known = {f.name[:-5]: f for f in resources.files("stackrace.conf").joinpath("model").iterdir()}
    if name not in known:
        raise UsageError(f"no model {name!r}: choose one of {', '.join(sorted(known))}, or add conf/model/{name}.yaml")
    model = yaml.safe_load(known[name].read_text())
    path = out or Path("models", f"{name}-seed{seed}")
    try:
        checkpoint.make(model["config"], path, seed, model["shard_bytes"], device)
    except OSError as e:
        raise UsageError(f"cannot write {path}: {e.strerror or e}: give another --out") from None
    return inspect(path)


def inspect(path: Path) -> str:
    """What a checkpoint holds, several lines. UsageError if it is not whole."""
    found = checkpoint.check(path)
    config = found.config
    return "\n".join(
        [
            f"{path}: {config['model_type']}, {found.num_parameters:,} parameters, {found.num_bytes:,} bytes",
            f"identity {found.identity}",
            f"{config['num_hidden_layers']} layers, {config['num_attention_heads']} heads, "
            f"context {config['max_position_embeddings']:,}, vocabulary {config['vocab_size']:,}",
            *(
                f"KV cache as {attention}: {width:,} values a token and layer, "
                f"{found.kv_bytes_per_token(attention, 2):,} bytes a token in bf16"
                for attention, width in kv_widths(config).items()
            ),
        ]
    )
