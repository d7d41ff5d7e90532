"""Stand-in for SGLang's package of CPU kernels, which is on no registry.

It holds no kernels: SGLang finds no torch.ops.sgl_kernel.convert_weight_packed, takes the processor for one without
AMX, and every layer takes its path in plain torch.
"""

from collections.abc import Callable


def __getattr__(name: str) -> Callable[..., None]:
    if not name.endswith("_cpu"):
        raise AttributeError(name)

    def missing(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"the stand-in for sgl_kernel has no {name}")

    missing.__name__ = name
    return missing
