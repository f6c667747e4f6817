"""What a number is: formats, their grids and scales, and how codes are packed into bits."""

from alphaquant.formats.codec import (
    QuantizedTensor,
    dequantize,
    initial_scale,
    matrix_scale,
    pool_rows,
    quantize,
    quantize_values,
    quantize_with,
    round_scale,
    scale_bounds,
)
from alphaquant.formats.grid import Grid, decode, encode, round_to_grid
from alphaquant.formats.inputs import round_inputs
from alphaquant.formats.packing import pack_int32, pack_rows, unpack_int32, unpack_rows
from alphaquant.formats.spec import (
    FORMATS,
    UNQUANTIZED,
    Activation,
    ElementKind,
    Format,
    Inputs,
    ScaleKind,
    Scheme,
    parse_format,
)

__all__ = [
    "FORMATS",
    "UNQUANTIZED",
    "Activation",
    "ElementKind",
    "Format",
    "Grid",
    "Inputs",
    "QuantizedTensor",
    "ScaleKind",
    "Scheme",
    "decode",
    "dequantize",
    "encode",
    "initial_scale",
    "matrix_scale",
    "pack_int32",
    "pack_rows",
    "parse_format",
    "pool_rows",
    "quantize",
    "quantize_values",
    "quantize_with",
    "round_inputs",
    "round_scale",
    "round_to_grid",
    "scale_bounds",
    "unpack_int32",
    "unpack_rows",
]
