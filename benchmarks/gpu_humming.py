"""What humming-kernels computes on a GPU from the tensors that we store, against the de-quantized product; its time.

    pip install humming-kernels
    python benchmarks/gpu_humming.py --rows 4096 --columns 2048

For every format, symmetric and with zero points, with plain and with rounded inputs: `HummingLayer` is given the stored
tensors and the config that a checkpoint of ours has, and its output is held against the float64 product of inputs
(rounded where the layer rounds them) and de-quantized weight: `error` is the norm of the difference over that of the
product. Seconds are of the layer and of the bf16 product, for few and for many tokens. Prints JSON, with what the
library says of a scheme that it does not take; ends with code 1 where an error is over `--tolerance`.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

import torch
from gpu_kernels import seconds

from alphaquant.formats import FORMATS, Activation, ElementKind, ScaleKind, Scheme, dequantize, quantize, round_inputs
from alphaquant.layouts import LAYOUTS

if TYPE_CHECKING:
    from torch import Tensor


def schemes() -> list[Scheme]:
    """Each format in groups and, where it may, by row and with zero points; the most usual ones with rounded inputs."""
    found = []
    for fmt in FORMATS.values():
        groups = (fmt.native_group,) if fmt.scale is not ScaleKind.MODEL else (128, 32, -1)
        found += [Scheme(fmt, group) for group in groups if group is not None]
        if fmt.kind is ElementKind.INT:
            found.append(Scheme(fmt, 128, symmetric=False))
    found += [Scheme(FORMATS[name], -1, activation=Activation.INT8) for name in ("int4", "int8")]
    found += [Scheme(FORMATS[name], -1, activation=Activation.FP8) for name in ("int4", "fp8")]
    return found


def layer_of(scheme: Scheme, w: Tensor) -> tuple[Any, Tensor]:
    """A layer of the library with the tensors that we would store, and the weight that they stand for."""
    from humming.layer import HummingLayer  # noqa: PLC0415  (it looks for a GPU as it is imported)

    humming, q = LAYOUTS["humming"], quantize(w, scheme)
    config = humming.quantization_config({"m": scheme})
    assert config is not None
    config = {key: value for key, value in config.items() if key not in ("dynamic", "ignore")}
    stored = {name.removeprefix("m."): tensor for name, tensor in humming.tensors("m", q).items()}
    if "weight_scale_2" in stored:  # an engine copies it into a float32 parameter
        stored["weight_scale_2"] = stored["weight_scale_2"].float()
    layer = HummingLayer(
        shape_n=w.shape[0],
        shape_k=w.shape[1],
        weight_config=dict(config),
        input_config=dict(config) if "a_dtype" in config else None,
        torch_dtype=torch.bfloat16,
    ).cuda()
    layer.load_from_tensors(stored)
    layer.transform()
    return layer, dequantize(q)


def seen(x: Tensor, activation: Activation) -> Tensor:
    """The inputs as the layer rounds them, exactly."""
    if activation is Activation.BF16:
        return x.double()
    values, scale = round_inputs(x, activation)
    return values.double() * scale.double()


def measured(scheme: Scheme, w: Tensor, inputs: list[Tensor]) -> dict[str, Any]:
    layer, weight = layer_of(scheme, w)
    found: dict[str, Any] = {"scheme": str(scheme), "tokens": []}
    for x in inputs:
        exact = seen(x, scheme.activation) @ weight.cuda().double().T
        dense = weight.to("cuda", torch.bfloat16)
        found["tokens"].append(
            {
                "count": len(x),
                "error": ((layer(x).double() - exact).norm() / exact.norm()).item(),
                "seconds": seconds(lambda x=x: layer(x)),
                "seconds_bf16": seconds(lambda x=x, dense=dense: x @ dense.T),
            }
        )
    return found


def measured_or_failed(scheme: Scheme, w: Tensor, inputs: list[Tensor]) -> dict[str, Any]:
    try:
        return measured(scheme, w, inputs)
    except Exception as error:  # noqa: BLE001  (whatever the library raises is the finding)
        return {"scheme": str(scheme), "failed": f"{type(error).__name__}: {error}"[:500]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 4096])
    parser.add_argument(
        "--tolerance", type=float, default=0.01, help="bf16 rounds outputs by .002, inputs to 8 bits more"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: nothing was measured")
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(args.rows, args.columns, generator=generator) * 0.02
    inputs = [torch.randn(n, args.columns, generator=generator).to("cuda", torch.bfloat16) for n in args.tokens]
    rows = [measured_or_failed(scheme, w, inputs) for scheme in schemes()]
    worst = max((at["error"] for row in rows for at in row.get("tokens", ())), default=float("inf"))
    print(json.dumps({"device": torch.cuda.get_device_name(), "worst_error": worst, "schemes": rows}, indent=2))
    raise SystemExit(worst > args.tolerance)


if __name__ == "__main__":
    main()
