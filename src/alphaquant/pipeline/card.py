"""The model card: README.md of an output, as a hub and whoever finds the directory want to read it.

It says what follows from the result and from how it was asked for, and nothing of the machine: a run that was stopped
and went on writes the same one.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from alphaquant.checkpoint import hub_id_of, write_text
from alphaquant.engines import engine_notes, serve
from alphaquant.errors import AlphaQuantError
from alphaquant.pipeline.manifest import MANIFEST, Manifest, file_sha256
from alphaquant.pipeline.staging import FOLDER
from alphaquant.plan import ModuleKind
from alphaquant.wording import human_bytes, markdown_code, markdown_text, short

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from alphaquant.formats import Scheme
    from alphaquant.layouts import Layout
    from alphaquant.models import ModelSpec

__all__ = ["CARD", "QUALITY", "card", "heritage", "refresh_card"]

CARD = "README.md"
QUALITY = "quality"
"""Folder beside the records in which measurements are kept."""

_MAX_BYTES = 1 << 20
_FRONT_MATTER = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_SECTION = re.compile(r"## Quality\n.*?(?=\n\n## )", re.DOTALL)
# what is taken over is of a shape that means nothing else in YAML, or it is not taken over
_TAKEN_OVER = {
    "license": r"[A-Za-z0-9][\w.-]*",
    "license_name": r"[A-Za-z0-9][\w.-]*",
    "license_link": r"(?:https?://)?[\w./#%~-]+",
    "base_model": r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*",
}


def heritage(source: Path | None) -> dict[str, str]:
    """What a card takes over from the directory that weights came from: license, and the hub id of the original.

    Of an original the id is where it lies in the hub's cache: what its own card calls `base_model` is its parent. Of
    an output of ours it is what that card says.
    """
    if source is None:
        return {}
    found: dict[str, str] = {}
    with suppress(OSError):
        with (source / CARD).open("rb") as file:
            text = file.read(_MAX_BYTES).decode(errors="replace")
        match = _FRONT_MATTER.match(text)
        for line in match[1].splitlines() if match else ():
            key, _, value = line.partition(":")
            value = value.strip().strip("\"'")
            if key in _TAKEN_OVER and re.fullmatch(_TAKEN_OVER[key], value):
                found[key] = value
    if not (source / MANIFEST).is_file():
        found.pop("base_model", None)
        if (hub_id := hub_id_of(source)) is not None:
            found["base_model"] = hub_id
    return found


def card(
    directory: Path,
    config: Mapping[str, Any],
    spec: ModelSpec,
    layout: Layout,
    schemes: Mapping[str, Scheme | None],
    num_bytes: int,
    inherited: Mapping[str, str],
) -> str:
    """The card of an output in the making, whose notes are written.

    Args:
        directory: where it is made.
        config: its config.json.
        spec: the model.
        layout: how its modules are stored.
        schemes: every module by checkpoint name; None is left as it is.
        num_bytes: of its shards.
        inherited: from `heritage`.
    """
    report, plan = (_json(directory / FOLDER / name) for name in ("report.json", "plan.json"))
    path = str(_part(report, "model").get("path", ""))
    name = inherited.get("base_model") or hub_id_of(path) or PurePath(path).name or spec.architecture
    rows = _formats(spec, schemes)
    weights = sum(row.weights for row in rows)
    bits = sum(row.bits for row in rows) / weights if weights else None
    before = _part(report, "sizes").get("before_bytes")
    shrunk = f"{human_bytes(before)} → " if isinstance(before, int) else ""
    facts = {
        "original": f"{markdown_code(name)}, {markdown_text(spec.architecture)}",
        "size of the weights": shrunk + human_bytes(num_bytes),
        "average bits a quantized weight, with scales": "nothing is quantized" if bits is None else f"{bits:.3f}",
        "layout": markdown_text(layout.name),
        "calibration": _calibration(report),
    }
    notes = engine_notes(schemes, list(spec.modules()), layout.name, spec.family)
    ways = serve(notes, layout.name, ".", runs_code="auto_map" in config)
    return "\n".join(
        [
            *_front_matter(inherited, layout, report),
            "",
            f"# {markdown_text(name)}, quantized",
            "",
            "A quantization in mixed precision by AlphaQuant.",
            "",
            *_table(("", ""), facts.items()),
            "",
            "## Use",
            "",
            "In this directory:",
            "",
            *(f"- {way.engine}: {markdown_code(way.command)}{_caveat(way.caveat)}" for way in ways),
            "",
            "## Formats",
            "",
            *_table(("modules", "format", "number", "weights", "bits a weight"), (row.cells for row in rows)),
            "",
            _quality(directory),
            "",
            "## How it was made",
            "",
            *_fenced("bash", _command(report)),
            *(_fenced("json", json.dumps(plan, indent=2, ensure_ascii=False)) if plan else ()),
            f"AlphaQuant {report.get('alphaquant', version('alphaquant-moe'))}. A record of every module is in",
            f"`{FOLDER}/`; `alphaquant verify .` holds all files against what was written.",
            "",
        ]
    )


def refresh_card(directory: Path) -> None:
    """Put what was measured into the card of a finished directory, unless someone has changed the card since."""
    path = directory / CARD
    with suppress(OSError, AlphaQuantError):  # the figures are kept whether or not the card can tell them
        manifest = Manifest.read(directory)
        if manifest is None or manifest.files.get(CARD) != file_sha256(path):
            return
        text = _SECTION.sub(lambda _: _quality(directory), path.read_text(encoding="utf-8"), count=1)
        replace(manifest, files=manifest.files | {CARD: write_text(path, text)}).write(directory)


class _Row:
    """The modules of one kind under one scheme."""

    def __init__(self, kind: str, scheme: str) -> None:
        self.kind, self.scheme = kind, scheme
        self.modules, self.weights, self.bits = 0, 0, 0.0

    @property
    def cells(self) -> tuple[str, ...]:
        bits = f"{self.bits / self.weights:.3f}"
        return self.kind.replace("_", " "), self.scheme, f"{self.modules:,}", short(self.weights), bits


def _formats(spec: ModelSpec, schemes: Mapping[str, Scheme | None]) -> list[_Row]:
    rows: dict[tuple[ModuleKind, str], _Row] = {}
    for module in spec.modules():
        scheme = schemes.get(module.name)
        if scheme is not None:
            row = rows.setdefault((module.kind, str(scheme)), _Row(module.kind.value, str(scheme)))
            weights = module.out_features * module.in_features
            row.modules += 1
            row.weights += weights
            row.bits += weights * scheme.bits_per_weight(module.out_features, module.in_features)
    order = list(ModuleKind)
    return [rows[key] for key in sorted(rows, key=lambda key: (order.index(key[0]), key[1]))]


def _front_matter(inherited: Mapping[str, str], layout: Layout, report: Mapping[str, Any]) -> Iterator[str]:
    yield "---"
    for key, value in inherited.items():
        yield f"{key}: {json.dumps(value)}"
    if "base_model" in inherited:
        yield "base_model_relation: quantized"
    yield "pipeline_tag: text-generation"
    yield "tags:"
    is_gptq = _part(report, "calibration") and _part(report, "recipe").get("method") == "gptq"
    tags = ["alphaquant", "gptq" if is_gptq else "", layout.name]
    yield from (f"- {tag}" for tag in dict.fromkeys(tags) if tag)
    yield "---"


def _calibration(report: Mapping[str, Any]) -> str:
    found = _part(report, "calibration")
    with suppress(KeyError, TypeError, ValueError):
        source = markdown_text(PurePath(str(found["source"])).name)
        return f"{source}, {found['num_samples']:,} windows of {found['seqlen']:,} tokens, seed {int(found['seed'])}"
    return "none: rounded to nearest" if report else "not recorded"


def _command(report: Mapping[str, Any]) -> str:
    """The command that started the run; the one that went on may have had other options of no consequence."""
    sessions = report.get("sessions")
    first = sessions[0] if isinstance(sessions, list) and sessions else None
    return str((isinstance(first, dict) and first.get("command")) or "# from Python, in memory")


def _quality(directory: Path) -> str:
    """The section of what was measured; a later measurement takes its place."""
    rows = []
    for path in sorted((directory / FOLDER / QUALITY).glob("*.json")):
        found = _json(path)
        with suppress(KeyError, TypeError, ValueError):  # not a measurement
            rows.append(
                (
                    markdown_text(PurePath(found.get("data") or path.stem).name),
                    markdown_text(found.get("weights") or "quantized"),
                    f"{found['perplexity']:.4f} ± {found['stderr']:.4f}",
                    _figure(found.get("original_perplexity"), ".4f"),
                    _figure(found.get("kl"), ".5f"),
                    _figure(found.get("top1_agreement"), ".2%"),
                )
            )
    heads = ("text", "weights", "perplexity", "original", "KL to the original, nats a token", "same top token")
    missing = "Not measured yet: `alphaquant eval . --against MODEL` does, and writes it here."
    return "\n".join(["## Quality", "", *(_table(heads, rows) if rows else [missing])])


def _figure(value: Any, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _caveat(text: str) -> str:
    return f" ({markdown_text(text)})" if text else ""


def _table(heads: Sequence[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _fenced(language: str, text: str) -> tuple[str, ...]:
    """A block of code that its own backticks do not end."""
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    return f"{fence}{language}", text, fence, ""


def _part(report: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of a report; an empty one where it is missing or someone has changed it."""
    part = report.get(key)
    return part if isinstance(part, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is none."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
