"""Run by a Python with GPTQModel: the weights that its own reference linear makes of stored tensors, on a CPU.

``python gptqmodel_probe.py STORED SETTINGS WEIGHTS``: a safetensors file of ``CASE.qweight`` …, a JSON object
``{CASE: {"bits", "group_size", "sym", "checkpoint_format"}}``, and the safetensors file to write ``CASE`` [O, I] to.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from safetensors.torch import load_file, save_file


def main(stored: str, settings: str, weights: str) -> None:
    tensors, found = load_file(stored), {}
    for case, said in json.loads(Path(settings).read_text()).items():
        own: dict[str, Any] = {name.rpartition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{case}.")}
        linear = TorchLinear(
            bits=said["bits"],
            group_size=said["group_size"],
            sym=said["sym"],
            desc_act=said["desc_act"],
            in_features=len(own["g_idx"]),
            out_features=own["scales"].shape[1],
        ).eval()
        for name, tensor in own.items():
            buffer = getattr(linear, name)
            assert (buffer.shape, name == "scales" or buffer.dtype == tensor.dtype) == (tensor.shape, True), (
                case,
                name,
            )
            setattr(linear, name, tensor)
        if said["checkpoint_format"] == "gptq":  # as it does when it loads a checkpoint
            convert_gptq_v1_to_v2_format_module(linear, said["bits"], torch.int32)
        linear.post_init()
        found[case] = linear.dequantize_weight().T.float().contiguous()
    save_file(found, weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
