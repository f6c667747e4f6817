"""Quantized tensors whose codes, scales and zero points take every value that they may have."""

import contextlib
import itertools

import torch

from alphaquant.errors import PlanError
from alphaquant.formats import FORMATS, Activation, ElementKind, QuantizedTensor, ScaleKind, Scheme

GROUPS = (-1, 8, 16, 32, 64, 128)
POWERS = torch.tensor([2.0**k for k in range(-127, 128)])  # every E8M0 scale
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def all_schemes(groups=GROUPS, dtypes=(torch.bfloat16,), inputs=tuple(Activation)):
    found = []
    choices = itertools.product(FORMATS.values(), groups, (True, False), dtypes, inputs)
    for fmt, group, symmetric, dtype, activation in choices:
        if fmt.scale is not ScaleKind.MODEL and dtype != dtypes[0]:
            continue  # the scale dtype means nothing to it
        with contextlib.suppress(PlanError):  # a combination that does not exist
            found.append(Scheme(fmt, group, symmetric=symmetric, scale_dtype=dtype, activation=activation))
    return found


def scheme(name, group=None, *, symmetric=True, dtype=torch.bfloat16, inputs="bf16"):
    fmt, activation = FORMATS[name], Activation(inputs)
    return Scheme(fmt, group or fmt.native_group or 32, symmetric=symmetric, scale_dtype=dtype, activation=activation)


def random_quantized(scheme, out_features, in_features, seed=0):
    """Random bits, not a quantized weight: codes no solver would choose must survive as well."""
    rng = torch.Generator().manual_seed(seed)
    fmt, groups = scheme.format, scheme.num_groups(in_features)
    limit = 1 << fmt.bits

    def draw(high, *shape):
        return torch.randint(0, high, shape, generator=rng)

    codes = draw(limit, out_features, in_features).to(torch.uint8)
    if fmt.kind is ElementKind.FLOAT and fmt.bits == 8:  # the largest finite magnitude; a quantizer makes no NaN
        codes = (codes & 0x80) | (codes & 0x7F).clamp_max(0x7B if fmt.exponent_bits == 5 else 0x7E)
    if fmt.scale is ScaleKind.E8M0:
        scale = POWERS[draw(255, out_features, groups)]
    elif fmt.scale is ScaleKind.E4M3:
        scale = (1 + draw(0x7E, out_features, groups)).to(torch.uint8).view(torch.float8_e4m3fn).float()
    else:
        scale = torch.rand(out_features, groups, generator=rng).mul(8).exp2().to(scheme.scale_dtype).float()
        scale = scale[torch.arange(out_features) // fmt.block_rows]  # rows of a block hold the same
    zero = None if scheme.symmetric else draw(limit, out_features, groups).to(torch.uint8)
    is_nvfp4 = fmt.scale is ScaleKind.E4M3
    global_scale = torch.rand((), generator=rng).mul(40).sub(20).exp2() if is_nvfp4 else None
    return QuantizedTensor(codes, scale, zero, global_scale, scheme)


def bits_of(x):
    return x if x is None else x.contiguous().reshape(-1).view(torch.uint8)


def assert_same(a, b):
    assert a.scheme == b.scheme
    for field in ("codes", "scale", "zero", "global_scale"):
        x, y = getattr(a, field), getattr(b, field)
        assert (x is None) == (y is None), field
        if x is not None:
            assert (x.dtype, x.shape) == (y.dtype, y.shape), field
            assert torch.equal(bits_of(x), bits_of(y)), field
