"""`stackrace model`: make or inspect a checkpoint."""

from importlib import resources
from pathlib import Path

import yaml

from stackrace.backends import checkpoint
from stackrace.backends.architectures import kv_widths
from stackrace.harness.errors import UsageError, require

SMALL = 2_000_000_000  # bytes of a checkpoint whose experts are looked at without being asked, on a CPU


def make(name: str, seed: int, out: Path | None, device: str, experts: bool | None) -> str:
    """Write the checkpoint of conf/model/<name>.yaml; returns what `inspect` says of it.

    `experts` None: its routers are run if it has experts, and it is small or the device no CPU.
    """
    known = {f.name[:-5]: f for f in resources.files("stackrace.conf").joinpath("model").iterdir()}
    if name not in known:
        raise UsageError(f"no model {name!r}: choose one of {', '.join(sorted(known))}, or add conf/model/{name}.yaml")
    model = yaml.safe_load(known[name].read_text())
    path = out or Path("models", f"{name}-seed{seed}")
    check_device(device)
    try:
        found = checkpoint.make(model["config"], path, seed, model["shard_bytes"], device)
    except OSError as e:
        raise UsageError(f"cannot write {path}: {e.strerror or e}: give another --out") from None
    is_quick = device != "cpu" or found.num_bytes < SMALL
    return _described(found, has_experts(found) and is_quick if experts is None else experts, device)


def check_device(device: str) -> None:
    """UsageError: neither cpu nor a GPU that torch can use."""
    require("--device", device, str, lambda v: v.partition(":")[0] in ("cpu", "cuda"), "cpu or cuda")
    if device != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise UsageError(f"--device {device}: torch finds no GPU here: use --device cpu")


def has_experts(found: checkpoint.Checkpoint) -> bool:
    """Whether any layer routes its tokens."""
    return any(name.endswith("mlp.gate.weight") for name in found.tensors)


def inspect(path: Path, experts: bool, device: str) -> str:
    """What a checkpoint holds, several lines; with `experts`, how evenly its routers choose, which runs the model.

    UsageError if it is not whole, or has no experts.
    """
    return _described(checkpoint.check(path), experts, device)


def _described(found: checkpoint.Checkpoint, experts: bool, device: str) -> str:
    return "\n".join([*_contents(found), *(_balance(found, device) if experts else [])])


def _contents(found: checkpoint.Checkpoint) -> list[str]:
    config = found.config
    return [
        f"{found.path}: {config['model_type']}, {found.num_parameters:,} parameters, {found.num_bytes:,} bytes",
        f"identity {found.identity}",
        f"{config['num_hidden_layers']} layers, {config['num_attention_heads']} heads, "
        f"context {config['max_position_embeddings']:,}, vocabulary {config['vocab_size']:,}",
        *(
            f"KV cache as {attention}: {width:,} values a token and layer, "
            f"{found.kv_bytes_per_token(attention, 2):,} bytes a token in bf16"
            for attention, width in kv_widths(config).items()
        ),
    ]


def _balance(found: checkpoint.Checkpoint, device: str) -> list[str]:
    if not has_experts(found):
        raise UsageError(f"{found.path}: {found.config['model_type']} has no routed experts: leave --experts out")
    check_device(device)
    import torch

    from stackrace.backends.mla import balance

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    load = balance.measure(found, torch.device(device), dtype, seed=0)
    return [
        f"experts: {load.num_chosen} of {load.num_experts} a token in {load.num_layers} layers; "
        f"{balance.BATCH} tokens touch {load.mean_touched:.1f} a layer, in the narrowest {load.fewest_touched:.1f}; "
        f"even routing {load.even_touched:.1f}",
        f"busiest expert: {load.largest_share:.1%} of {balance.BATCH * balance.POSITIONS:,} tokens; "
        f"even routing {load.even_share:.1%}",
    ]
