"""Write the generated parts of docs/: the keys of a plan from its schema, the formats from their definitions.

    python scripts/write_docs.py           # rewrites what is out of date
    python scripts/write_docs.py --check   # ends with code 1 where something is

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alphaquant.formats import FORMATS, ElementKind, ScaleKind, Scheme, dequantize, quantize
from alphaquant.layouts import LAYOUTS
from alphaquant.plan import Plan, plan_schema

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from alphaquant.formats import Format

DOCS = Path(__file__).parent.parent / "docs"
_SHAPE = (4096, 4096)
_SCALES = {
    ScaleKind.MODEL: "bf16",
    ScaleKind.E8M0: "power of two (E8M0)",
    ScaleKind.E4M3: "E4M3, and one fp32 a matrix",
}


def plan_keys() -> str:
    """Every key of a plan file, with its values and what it stands for when it is omitted."""
    schema = plan_schema()
    default = Plan().default.settings()
    parts = [
        ("at the top", schema["properties"], {}),
        ("in `default`", schema["properties"]["default"]["properties"], default),
        ("in an override", schema["properties"]["overrides"]["items"]["properties"], {}),
    ]
    rows: dict[str, tuple[list[str], str, str]] = {}
    for place, properties, filled in parts:
        for key, facts in properties.items():
            places, _, _ = row = rows.setdefault(key, ([], _values(facts), facts["description"]))
            places.append(place + (f" (else `{_json(filled[key])}`)" if key in filled else ""))
            rows[key] = row
    return _table(
        ("key", "where", "values", "meaning"),
        [(f"`{key}`", ", ".join(places), values, _escaped(text)) for key, (places, values, text) in rows.items()],
    )


def _values(facts: dict[str, Any]) -> str:
    if "enum" in facts:
        return " ".join(f"`{value}`" for value in facts["enum"])
    if "anyOf" in facts:
        return " or ".join(f"`{f['const']}`" if "const" in f else f"`{f['minimum']}` and up" for f in facts["anyOf"])
    return {"string": "text", "boolean": "`true` `false`", "object": "the keys below", "array": "a list of rules"}[
        facts["type"]
    ]


def _escaped(text: str) -> str:
    return text.replace("*", "\\*")


def _json(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def formats() -> str:
    """Every format: its element, its scale, what it costs, what it loses, and which layouts hold it."""
    rows = []
    for fmt in FORMATS.values():
        scheme = Scheme(fmt, fmt.native_group or 128)
        rows.append(
            (
                f"`{fmt}`",
                _element(fmt),
                f"{fmt.max_value:g}",
                f"{_SCALES[fmt.scale]}, {_shared(fmt)}",
                f"{scheme.bits_per_weight(*_SHAPE):.3f}",
                f"{100 * _gaussian_error(scheme):.2g}%",
                ", ".join(held for name in LAYOUTS if (held := _holding(name, scheme)) is not None),
            )
        )
    return _table(("format", "element", "largest", "scale", "bits a weight", "error", "layouts"), rows, "llrlrrl")


def _element(fmt: Format) -> str:
    if fmt.kind is ElementKind.INT:
        return f"{fmt.bits}-bit integer"
    return f"E{fmt.exponent_bits}M{fmt.mantissa_bits}, {fmt.bits} bits"


def _shared(fmt: Format) -> str:
    """What shares a scale."""
    if fmt.block_rows > 1:
        return f"a block of {fmt.block_rows} × {fmt.native_group}"
    return "a group" + ("" if fmt.native_group is None else f" of {fmt.native_group}")


def _holding(layout: str, scheme: Scheme) -> str | None:
    """The layout's name, and how it holds the format; None where it does not."""
    if LAYOUTS[layout].unsupported(scheme, _SHAPE) is None:
        return layout
    by_row = Scheme(scheme.format, -1) if scheme.format.native_group is None else scheme
    return f"{layout} (by row)" if LAYOUTS[layout].unsupported(by_row, _SHAPE) is None else None


def _gaussian_error(scheme: Scheme) -> float:
    """Squared error of rounding to nearest with absmax scales over the square of the weight."""
    w_OI = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))
    return float((dequantize(quantize(w_OI, scheme)) - w_OI).square().sum() / w_OI.square().sum())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> str:
    marks = ["--:" if where == "r" else "---" for where in align.ljust(len(head), "l")]
    lines = [head, marks, *rows]
    return "\n".join("| " + " | ".join(cell.strip() for cell in line) + " |" for line in lines)


PARTS: dict[str, Callable[[], str]] = {"plan keys": plan_keys, "formats": formats}


def rewritten(text: str) -> str:
    """A page with its generated parts made anew."""

    def fill(found: re.Match[str]) -> str:
        return f"{found[1]}\n{PARTS[found[2]]()}\n<!-- end -->"

    return re.sub(r"(<!-- generated: ([\w ]+) -->)\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> int:
    """Rewrite the pages, or only look whether they are current."""
    stale = []
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        new = rewritten(text)
        if new != text:
            stale.append(page)
            if "--check" not in sys.argv[1:]:
                page.write_text(new, encoding="utf-8")
    for page in stale:
        print(f"{page.name}: " + ("out of date" if "--check" in sys.argv[1:] else "written anew"))
    return 1 if stale and "--check" in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
