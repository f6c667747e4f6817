"""From one layout to another, shard by shard, losslessly from codes; and into a single file."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from alphaquant.checkpoint import Checkpoint
from alphaquant.engines import engine_notes
from alphaquant.errors import CheckpointError, OutputError
from alphaquant.layouts import LAYOUTS, MODULES_FILE, DenseLayout, QuantizedCheckpoint, choose_layout
from alphaquant.models import detect
from alphaquant.pipeline.manifest import Manifest
from alphaquant.pipeline.rundir import FOLDER, RunDir, check_output, check_writable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from alphaquant.formats import QuantizedTensor, Scheme
    from alphaquant.layouts import Layout
    from alphaquant.models import ModelSpec, TensorSource

__all__ = ["check_single_file", "export_checkpoint", "pick_layout", "save_single_file", "shard_names", "shard_tensors"]


def pick_layout(
    name: str | None, spec: ModelSpec, schemes: Mapping[str, Scheme | None], shapes: Mapping[str, tuple[int, int]]
) -> Layout:
    """The layout of that name, checked against the plan; the most widely served one for None.

    Raises:
        OutputError: there is no such layout, or it cannot hold a scheme of the plan.
        PlanError: none can.
    """
    if name is None:
        return choose_layout(schemes, shapes)
    if name not in LAYOUTS:
        raise OutputError(f"there is no layout {name!r}", remedy=f"give one of {', '.join(LAYOUTS)}")
    layout = DenseLayout(spec.dtype) if name == DenseLayout.name else LAYOUTS[name]
    for module, scheme in schemes.items():
        reason = None if scheme is None else layout.unsupported(scheme, shapes[module])
        if reason is not None:
            raise OutputError(
                f"the layout {name} cannot hold {scheme}: {reason}",
                where=module,
                remedy="choose another --format, or leave it to --format auto",
            )
    return layout


def shard_names(spec: ModelSpec, source: TensorSource) -> list[list[str]]:
    """Logical tensor names of each shard: one a layer, then embedding, final norm, head and what is carried over."""
    layers = [
        [name for parameter in spec.parameters(layer) for name in spec.tensor_names(layer, parameter)]
        for layer in range(spec.num_layers)
    ]
    carried = [name for name in source.names() if spec.is_carried(name)]
    return [*layers, [*(f"{p.role}.{p.leaf}" for p in spec.outer_parameters()), *carried]]


def shard_tensors(
    names: list[str], quantized: Callable[[str], QuantizedTensor | None], layout: Layout, read: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """What a shard stores for logical tensors: quantized modules in the layout, all others as they are read.

    Args:
        names: of the tensors.
        quantized: gives the codes of a module; None where it is not quantized.
        layout: how modules are stored.
        read: gives a tensor that is not quantized.
    """
    tensors: dict[str, Tensor] = {}
    for name in names:
        module = name.removesuffix(".weight")
        codes = quantized(module) if name.endswith(".weight") else None
        tensors.update({name: read(name)} if codes is None else layout.tensors(module, codes))
    return tensors


def export_checkpoint(source: Path, out: Path, layout_name: str | None, *, overwrite: bool = False) -> int:
    """Write a quantized directory in another layout; returns the bytes of its shards.

    Args:
        source: directory that a run made, in a layout that keeps codes.
        out: directory to make; it appears only when it is complete.
        layout_name: a name of `LAYOUTS`; None for the most widely served one.
        overwrite: replace `out` if it holds something.

    Raises:
        CheckpointError: the source keeps no codes.
        OutputError: the layout cannot hold a scheme, or `out` cannot be written.
    """
    quantized = QuantizedCheckpoint.open(source)
    checkpoint = quantized.checkpoint
    spec = detect(checkpoint.config, str(source / "config.json"))
    schemes = {module.name: None for module in spec.modules()} | {
        name: module.scheme for name, module in quantized.modules.items()
    }
    shapes = {name: module.shape for name, module in quantized.modules.items()}
    layout = pick_layout(layout_name, spec, schemes, shapes)
    check_output(out, source, overwrite=overwrite)
    written = Manifest.read(source) if layout.name == quantized.layout.name else None
    names = shard_names(spec, quantized)
    with RunDir.create(out, len(names)) as run:
        if written is not None and len(written.shards) == len(names):
            for shard in written.shards:
                run.copy_shard(source, shard)
        else:
            for part in names:
                run.add_shard(shard_tensors(part, quantized.codes_of, layout, checkpoint.read))
        for note in sorted((source / FOLDER).rglob("*.json")):
            name = note.relative_to(source / FOLDER).as_posix()
            if name not in ("manifest.json", "modules.json"):
                content = _read_note(note)
                if name == "report.json":
                    engines = engine_notes(schemes, list(spec.modules()), layout.name, spec.family)
                    content = _restated(content, layout, run.num_bytes) | {"engines": engines}
                run.write_note(name, content)
        run.finish(checkpoint.config, source, spec, layout, schemes)
    return run.num_bytes


def _read_note(path: Path) -> dict[str, Any]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} holds no JSON object", where=str(path), remedy="restore or remove it")
    return content


def _restated(report: dict[str, Any], layout: Layout, num_bytes: int) -> dict[str, Any]:
    """The report of a run, with what an export changes of it."""
    sizes = report.get("sizes")
    changed = {"sizes": sizes | {"after_bytes": num_bytes}} if isinstance(sizes, dict) else {}
    return report | {"layout": layout.name} | changed


def check_single_file(path: Path, *, overwrite: bool) -> None:
    """Refuse a file that is there already, or that cannot be made, before any work is done.

    Raises:
        OutputError: what is in the way.
    """
    check_writable(path)
    if path.is_dir() or (path.exists() and not overwrite):
        remedy = "choose another file" if path.is_dir() else "choose another file, or pass --overwrite"
        raise OutputError(f"{path} already exists", remedy=remedy)


def save_single_file(source: Path, path: Path, *, remove_source: bool = False) -> None:
    """Write one `.pt` file with the tensors of a quantized directory and what says how to read them.

    `torch.load(path, weights_only=True)` gives `{"version", "config", "modules", "tensors"}`: config.json, the table
    of `alphaquant/modules.json` (None in the dense layout) and the stored tensors by name.

    Raises:
        CheckpointError: the source is not a checkpoint.
        OutputError: the file cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(_single_file_content(source), part)
        part.replace(path)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{path} cannot be written: {error}", remedy="choose another file") from error
    finally:
        with suppress(OSError):  # it is gone where all went well
            part.unlink()
        if remove_source:
            shutil.rmtree(source, ignore_errors=True)


def _single_file_content(source: Path) -> dict[str, Any]:
    checkpoint = Checkpoint.open(source)
    table = source / MODULES_FILE
    return {
        "version": 1,
        "config": checkpoint.config,
        "modules": json.loads(table.read_text(encoding="utf-8")) if table.is_file() else None,
        "tensors": {name: checkpoint.read(name) for name in checkpoint.names()},
    }
