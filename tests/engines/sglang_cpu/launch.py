"""Start the real SGLang server on a machine without a GPU, from packages of a registry alone.

SGLang's CPU kernels are on no registry, so three stand-ins make its plain-torch path run: the operators' schemas below,
the package in shim/, and the attention rule registered here. Spawned workers import this file again, so what stands
outside of the last lines reaches them too; for that reason this file is started, not `python -m sglang.launch_server`.
"""

import os
import runpy
import sys
from pathlib import Path

_SHIM = str(Path(__file__).with_name("shim"))
sys.path.insert(0, _SHIM)
os.environ["PYTHONPATH"] = _SHIM  # for the workers

import torch  # noqa: E402

# torchvision's build on the registry needs CUDA's libraries; SGLang imports it and uses none of its operators.
_torchvision = torch.library.Library("torchvision", "DEF")
_torchvision.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_torchvision.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry  # noqa: E402
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod  # noqa: E402

# torch_native reads the cache of latents, so a fresh prefill must take the absorbed form as well.
AttentionBackendRegistry.register("torch_native", lambda attention, batch: AttnForwardMethod.MLA)

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
