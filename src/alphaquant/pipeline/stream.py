"""The streaming loop: all sequences go through one half-layer, then through the next.

Shapes: N sequences, L positions, D hidden. The residual stream `x_NLD` stays where it is held, in memory by default;
weights come and go by layer.
"""

from __future__ import annotations

import math
import mmap
import os
import resource
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from alphaquant.errors import NumericsError, OutputError
from alphaquant.models import as_served, attention_half, mlp_half, read_layer, rope_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from alphaquant.formats import Scheme
    from alphaquant.models import Choice, LayerWeights, ModelSpec, Tap, TensorSource

__all__ = [
    "Bad",
    "Clock",
    "HeldStream",
    "Progress",
    "Stream",
    "attend",
    "chunks",
    "embed",
    "feed",
    "half_function",
    "held_stream",
    "is_finite",
    "no_number",
    "resident_memory",
    "silent",
    "through",
]

# Tokens that go through a layer together. Sums over tokens are made chunk by chunk, so it is part of the result.
CHUNK_TOKENS = 8192


class Progress(Protocol):
    """Told what the loop does: the phase, which of how many layers, and how many tokens a phase works through."""

    def __call__(self, phase: str, layer: int, num_layers: int, tokens: int = 0) -> None:
        """Called when a phase of a layer begins."""


def silent(phase: str, layer: int, num_layers: int, tokens: int = 0) -> None:
    """Report nothing."""


class Clock:
    """Seconds spent by phase, and the main memory that the process held at the end of one, at most.

    Args:
        tell: is told seconds and memory of each part of a phase when it is over.
    """

    def __init__(self, tell: Callable[[str, float, int], None] | None = None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.memory: dict[str, int] = defaultdict(int)
        self._tell = tell

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time of a block to `phase`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            spent, resident = time.perf_counter() - begin, resident_memory()
            self.seconds[phase] += spent
            self.memory[phase] = max(self.memory[phase], resident)
            if self._tell is not None:
                self._tell(phase, spent, resident)


def resident_memory() -> int:
    """Main memory that the process holds now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def chunks(num_sequences: int, length: int) -> list[slice]:
    """Slices of sequences of about `CHUNK_TOKENS` tokens each; they depend on nothing but the two sizes."""
    size = max(1, CHUNK_TOKENS // length)
    return [slice(start, min(start + size, num_sequences)) for start in range(0, num_sequences, size)]


class HeldStream:
    """A residual stream that lies elsewhere than where it is worked on: its chunks come to the device and go back.

    It has a tensor's shape, device and dtype, and some of its sequences are read and written at a time.

    Args:
        rows_NLD: where it lies.
        device: where it is worked on.
        release: gives up the memory of what was last read or written, where it is kept on disk.
        folder: where that is.
    """

    def __init__(
        self,
        rows_NLD: Tensor,
        device: torch.device,
        release: Callable[[], None] | None = None,
        folder: Path = Path(),
    ) -> None:
        self.rows_NLD = rows_NLD
        self.device = device
        self.folder = folder
        self.release = release or (lambda: None)

    @property
    def shape(self) -> torch.Size:
        """`[N, L, D]`."""
        return self.rows_NLD.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.rows_NLD.dtype

    def __getitem__(self, cut: slice | Tensor) -> Tensor:
        """A copy of some sequences, on the device."""
        part = self.rows_NLD[cut].to(self.device, copy=True)
        self.release()
        return part

    def __setitem__(self, cut: slice | Tensor, value: Tensor) -> None:
        """Replace some sequences."""
        self.rows_NLD[cut] = value.to(self.rows_NLD.device)
        self.release()

    def clone(self) -> HeldStream:
        """Another one of the same content, which lies where this one does."""
        sequences, length, hidden = self.shape
        other = held_stream((sequences, length, hidden), self.dtype, self.device, self.folder)
        for cut in chunks(sequences, length):
            other[cut] = self[cut]
        return other


Stream = Tensor | HeldStream


def held_stream(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, folder: Path) -> HeldStream:
    """An empty stream in the host's memory, pinned, for a GPU; for a CPU in a file that vanishes with the process.

    Args:
        shape: `[N, L, D]`.
        dtype: of the activations.
        device: where they are worked on.
        folder: where the file is made.

    Raises:
        OutputError: it cannot be made.
    """
    if device.type != "cpu":
        return HeldStream(torch.empty(shape, dtype=dtype, pin_memory=True), device)
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # a full disk is told now, not by a signal later
            pages = mmap.mmap(file.fileno(), num_bytes)
    except OSError as error:
        raise OutputError(
            f"the activations take {num_bytes} bytes on disk: {error.strerror}",
            where=str(folder),
            remedy="make room, give fewer --nsamples, or more --max-memory",
        ) from error
    rows_NLD = torch.frombuffer(pages, dtype=dtype).view(shape)
    # shared pages that are given up are kept by the file: they come back when they are read
    return HeldStream(rows_NLD, device, lambda: pages.madvise(mmap.MADV_DONTNEED), folder)


def embed(ids_NL: Tensor, embedding_VD: Tensor) -> Tensor:
    """The residual stream before the first layer."""
    return F.embedding(ids_NL.to(embedding_VD.device), embedding_VD)


class Bad(Protocol):
    """Told of samples whose activations are NaN or infinite after a half-layer."""

    def __call__(self, samples: list[int]) -> None:
        """Called while the stream still holds what went in; the activations of these samples become zero then."""


def attend(
    x_NLD: Stream,
    weights: LayerWeights,
    spec: ModelSpec,
    layer: int,
    tap: Tap | None = None,
    cuts: Iterable[slice | Tensor] | None = None,
    bad: Bad | None = None,
) -> None:
    """Attention half of a layer on the stream, in place; with a `tap` it is only shown.

    Args:
        x_NLD: the stream.
        weights: of the layer.
        spec: the model.
        layer: its number.
        tap: is shown the inputs of linears.
        cuts: samples that go together; by default all of them by `chunks`.
        bad: is told of samples that become NaN or infinite.

    Raises:
        NumericsError: there are such samples, and no one is told.
    """
    where = f"layer {layer}, attention"
    _each_chunk(x_NLD, half_function(attend, weights, spec, layer, x_NLD, tap), where, tap, cuts, bad)


def feed(
    x_NLD: Stream,
    weights: LayerWeights,
    spec: ModelSpec,
    layer: int,
    tap: Tap | None = None,
    cuts: Iterable[slice | Tensor] | None = None,
    bad: Bad | None = None,
) -> None:
    """Feed-forward half of a layer on the stream, in place; see `attend`."""
    where = f"layer {layer}, feed-forward"
    _each_chunk(x_NLD, half_function(feed, weights, spec, layer, x_NLD, tap), where, tap, cuts, bad)


def half_function(
    half: Callable[..., None],
    weights: LayerWeights,
    spec: ModelSpec,
    layer: int,
    x_NLD: Stream,
    tap: Tap | None = None,
    choice: Choice | None = None,
) -> Callable[[Tensor], Tensor]:
    """What `half`, which is `attend` or `feed`, makes of sequences of a stream, not in place.

    A `choice` is the router's of these sequences' tokens.
    """
    if half is feed:
        return lambda x: mlp_half(x, weights, spec, layer, tap=tap, choice=choice)
    rope = rope_for(spec, x_NLD.shape[1], x_NLD.device)
    return lambda x: attention_half(x, weights, spec, layer, rope, tap=tap)


@torch.no_grad()
def through(
    x_NLD: Tensor,
    source: TensorSource,
    spec: ModelSpec,
    dtype: torch.dtype,
    phase: str,
    progress: Progress = silent,
    schemes: Mapping[str, Scheme | None] | None = None,
) -> Iterator[tuple[int, LayerWeights]]:
    """Take a stream through a model as it is, in place; each layer is given between its two halves.

    Args:
        x_NLD: the stream before the first layer, where it is worked on.
        source: the model's tensors.
        spec: the model.
        dtype: of the weights while they are worked on.
        phase: what `progress` is told.
        progress: is told which layer begins.
        schemes: of modules that round their inputs; none by default.
    """
    for layer in range(spec.num_layers):
        progress(phase, layer, spec.num_layers, x_NLD.shape[0] * x_NLD.shape[1])
        weights = as_served(read_layer(source, spec, layer, dtype, x_NLD.device), spec, layer, schemes or {})
        attend(x_NLD, weights, spec, layer)
        yield layer, weights
        feed(x_NLD, weights, spec, layer)


@torch.no_grad()
def _each_chunk(
    x_NLD: Stream,
    half: Callable[[Tensor], Tensor],
    where: str,
    tap: Tap | None,
    cuts: Iterable[slice | Tensor] | None,
    bad: Bad | None,
) -> None:
    for cut in chunks(*x_NLD.shape[:2]) if cuts is None else cuts:
        out = half(x_NLD[cut])
        if tap is not None:
            continue
        if not is_finite(out):
            is_bad = (~torch.isfinite(out)).flatten(1).any(1)
            samples = torch.arange(x_NLD.shape[0])[cut][is_bad.cpu()].tolist()
            if bad is None:
                raise no_number(samples[0], where)
            bad(samples)
            out[is_bad] = 0
        x_NLD[cut] = out


def is_finite(x: Tensor) -> bool:
    """Whether all elements are numbers: one pass, a sum of their own type; and a look at each where it overflows."""
    return math.isfinite(x.sum()) or bool(torch.isfinite(x).all())


def no_number(sample: int, where: str, module: str = "") -> NumericsError:
    """The error for activations that are NaN or infinite."""
    return NumericsError(
        f"activations become NaN or infinite in sample {sample}{module and f', {module}'}",
        where=where,
        remedy="run with --dtype fp32, or look at the weights of this layer",
    )
