"""Run by the Python of a vLLM: what its quantizer makes of inputs in groups of 128, de-quantized.

``python group_inputs_probe.py FILE``: replaces the tensor ``x`` [R, I] in a safetensors file.
"""

from __future__ import annotations

import sys

from safetensors.torch import load_file, save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

if __name__ == "__main__":
    x = load_file(sys.argv[1])["x"]
    with set_current_vllm_config(VllmConfig()):
        values, scale = QuantFP8(False, GroupShape(1, 128), use_ue8m0=False).forward_native(x)
    groups = values.float().unflatten(-1, (-1, 128)) * scale.reshape(len(x), -1, 1)
    save_file({"x": groups.flatten(-2).to(x.dtype)}, sys.argv[1])
