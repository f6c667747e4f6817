"""GPTQModel's own linear makes our weights of what we store: every width, group and zero point of both layouts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaquant.formats import FORMATS, Scheme, dequantize
from alphaquant.layouts import LAYOUTS
from layouts.samples import random_quantized

PROBE = Path(__file__).parent / "gptqmodel_probe.py"
SHAPE = (64, 256)
CASES = {
    f"{layout}-{bits}-{group}-{'sym' if symmetric else 'asym'}": (
        layout,
        Scheme(FORMATS[f"int{bits}"], group, symmetric=symmetric, scale_dtype=torch.float16),
    )
    for layout in ("gptq", "gptq_v2")
    for bits in (2, 3, 4, 8)
    for group in (-1, 16, 32, 64, 128)
    for symmetric in (True, False)
    if layout == "gptq_v2" or symmetric
}


@pytest.fixture(scope="session")
def weights(request, tmp_path_factory):
    """What GPTQModel reads, by case; one process for all."""
    python = Path(request.config.getoption("--gptqmodel"))
    if not python.exists():
        pytest.skip(f"there is no GPTQModel at {python}: `make test-gptqmodel` installs it, with a torch of several GB")
    root = tmp_path_factory.mktemp("gptqmodel")
    stored, said = {}, {}
    for case, (layout, scheme) in CASES.items():
        q = random_quantized(scheme, *SHAPE)
        stored |= {f"{case}.{name[2:]}": tensor for name, tensor in LAYOUTS[layout].tensors("m", q).items()}
        said[case] = LAYOUTS[layout].quantization_config({"m": scheme})
    save_file(stored, root / "stored")
    (root / "settings").write_text(json.dumps(said))
    command = [str(python), str(PROBE), *(str(root / name) for name in ("stored", "settings", "weights"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(root / "weights")


@pytest.mark.parametrize("case", CASES)
def test_gptqmodel_reads_our_weight(weights, case):
    ours = dequantize(random_quantized(CASES[case][1], *SHAPE))
    assert torch.equal(weights[case], ours.half().float())  # it computes in fp16
