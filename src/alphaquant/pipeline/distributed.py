"""The processes that work on one run together: who does what, and what passes between them.

Every process reads every layer and takes its turn at the chunks of calibration tokens. The inputs that a chunk shows
go to the owners of the experts and linears that read them; an owner adds them up in the order of the chunks, as a
single process would, and solves. So Hessians stay where they are, are held once, and no sum depends on how many
processes there are. Between them pass tensors and JSON, nothing that would be unpickled.

Shapes: E experts, R rows, I inputs.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed as dist

from alphaquant.checkpoint import read_rows
from alphaquant.errors import AlphaQuantError, ConfigError
from alphaquant.models import Routing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from alphaquant.checkpoint import Slot
    from alphaquant.pipeline.stream import Stream

__all__ = ["SOLO", "Stored", "Team", "join"]

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Team:
    """One of `size` processes; one alone has no one to talk to, and every exchange gives back what it was given."""

    rank: int = 0
    size: int = 1

    def turns(self, items: Sequence[_Item]) -> list[_Item | None]:
        """This process's items, in as many rounds as the others have; None in a round in which none is left for it."""
        places = [start + self.rank for start in range(0, len(items), self.size)]
        return [items[place] if place < len(items) else None for place in places]

    def shares(self, costs: Mapping[_Item, Sequence[float]]) -> dict[_Item, list[range]]:
        """Which parts of several wholes each process takes, by its rank, given what each part costs.

        The parts of one whole are shared out in runs of one length; a whole of one part goes to the least burdened.
        """
        burdens, shares = [0.0] * self.size, {}
        for whole, parts in sorted(costs.items(), key=lambda item: (-len(item[1]), -sum(item[1]))):
            number = len(parts)
            ends = [number * rank // self.size for rank in range(self.size + 1)]
            if number == 1:
                ends = [int(rank > burdens.index(min(burdens))) for rank in range(self.size + 1)]
            shares[whole] = [range(*pair) for pair in pairwise(ends)]
            for rank, share in enumerate(shares[whole]):
                burdens[rank] += sum(parts[share.start : share.stop])
        return {whole: shares[whole] for whole in costs}

    def exchange(
        self, x_RI: Tensor, routing: Routing | None, num_experts: int, takes: Sequence[range]
    ) -> list[tuple[Tensor, Routing | None]]:
        """Give each process the rows of the experts that it takes, and take one's own, a part for each process.

        Args:
            x_RI: rows, sorted by expert; none in a process whose turns are over.
            routing: how they are routed.
            num_experts: 1 for what is not routed.
            takes: the experts that each process takes: runs that follow one another.

        Returns:
            For each process that had a turn the rows of one's own experts, and the routing of all its rows.
        """
        counts = [x_RI.shape[0]] if routing is None else routing.counts_E.tolist()
        # a process whose turns are over has no routing to say how many experts there are
        counts += [0] * (num_experts - len(counts))
        heads = self._all(torch.tensor([int(routing is not None), *counts]))
        cuts = [slice(sum(counts[: run.start]), sum(counts[: run.stop])) for run in takes]
        own = takes[self.rank]
        taken = [sum(head[1 + own.start : 1 + own.stop]) for head in heads]
        if all(before.stop == after.start for before, after in pairwise(cuts)):
            given_RI = x_RI[cuts[0].start : cuts[-1].stop]  # no copy
        else:
            given_RI = torch.cat([x_RI[cut] for cut in cuts])
        parts = self._swap(given_RI, [cut.stop - cut.start for cut in cuts], taken)
        totals = [sum(head[1:]) for head in heads]
        routings: list[Routing | None] = [None] * self.size
        if any(head[0] for head in heads):
            padded_R = x_RI.new_zeros(max(totals), dtype=torch.float32)
            if routing is not None:
                padded_R[: totals[self.rank]] = routing.score_R
            scores = [torch.empty_like(padded_R) for _ in heads]
            with _together():
                dist.all_gather(scores, padded_R)
            told = zip(heads, scores, totals, strict=True)
            routings = [Routing(torch.tensor(head[1:]), score[:total]) for head, score, total in told]
        return [(x, how) for x, how, total in zip(parts, routings, totals, strict=True) if total]

    def spread(self, tensor: Tensor, source: int) -> None:
        """Replace a tensor by that of another process, in place."""
        if self.size > 1:
            part = tensor.contiguous()
            with _together():
                dist.broadcast(_bytes(part), source)
            if part.data_ptr() != tensor.data_ptr():
                tensor.copy_(part)

    def tell(self, content: Any) -> list[Any]:
        """Objects of JSON, one of each process, in the order of their ranks."""
        if self.size == 1:
            return [content]
        data = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
        sizes = [head[0] for head in self._all(torch.tensor([data.numel()]))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: data.numel()] = data
        parts = [torch.empty_like(padded) for _ in sizes]
        with _together():
            dist.all_gather(parts, padded)
        return [json.loads(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]

    def stored(self, slots: Mapping[str, Slot]) -> dict[str, Stored]:
        """Tensors in files of the first process's, for all to read together."""
        infos = {name: slot.info for name, slot in slots.items()}
        described = self.tell({name: _described(info.dtype, info.shape) for name, info in infos.items()})[0]
        return {name: Stored(self, *_known(what), slots.get(name)) for name, what in described.items()}

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All processes' tensors at the first one, on the CPU; nothing at the others."""
        if self.size == 1:
            return dict(tensors)
        described = self.tell({name: _described(x.dtype, x.shape) for name, x in tensors.items()})
        if self.rank:
            with _together():
                for tensor in tensors.values():
                    dist.send(_bytes(tensor.cpu().contiguous()), 0)
            return {}
        result = dict(tensors)
        for rank in range(1, self.size):
            for name, what in described[rank].items():
                shape, dtype = _known(what)
                result[name] = torch.empty(shape, dtype=dtype)
                with _together():
                    dist.recv(_bytes(result[name]), rank)
        return result

    def gather_turns(self, x: Stream, items: Sequence[slice]) -> None:
        """Fill the first process's tensor with the parts of others, which took turns at `items`."""
        for place, item in enumerate(items):
            owner = place % self.size
            if owner == 0 or self.rank not in (0, owner):
                continue
            part = x[item].cpu().contiguous()
            with _together():
                dist.send(_bytes(part), 0) if self.rank else dist.recv(_bytes(part), owner)
            if self.rank == 0:
                x[item] = part.to(x.device)

    def _all(self, numbers: Tensor) -> list[list[int]]:
        parts = [torch.empty_like(numbers) for _ in range(self.size)]
        with _together():
            dist.all_gather(parts, numbers)
        return [part.tolist() for part in parts]

    def _swap(self, x_RI: Tensor, given: list[int], taken: list[int]) -> Sequence[Tensor]:
        """Swap rows with all others: so many given to each, so many taken from each."""
        out_RI = x_RI.new_empty(sum(taken), x_RI.shape[1])
        with _together():
            dist.all_to_all_single(out_RI.view(torch.uint8), x_RI.contiguous().view(torch.uint8), taken, given)
        parts: Sequence[Tensor] = out_RI.split(taken)
        return parts


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file of the first process's: all of a team ask for the same rows, which it reads and gives them.

    Attributes:
        team: who asks.
        shape: of the whole.
        dtype: of its elements.
        slot: where it lies; None in the other processes.
    """

    team: Team
    shape: torch.Size
    dtype: torch.dtype
    slot: Slot | None

    def __getitem__(self, rows: slice) -> Tensor:
        """Some consecutive rows, on the CPU."""
        wanted = range(*rows.indices(self.shape[0]))
        if self.slot is None:
            part = torch.empty((len(wanted), *self.shape[1:]), dtype=self.dtype)
        else:
            part = read_rows(self.slot, wanted)
        self.team.spread(part, 0)
        return part


SOLO = Team()


@contextmanager
def join(device: torch.device) -> Iterator[tuple[Team, torch.device]]:
    """The team of the processes that torchrun started, and this one's device; one alone where it did not.

    Args:
        device: where to compute; of GPUs that are not numbered each process of a machine takes its own.

    Raises:
        ConfigError: all would compute on one GPU.
        AlphaQuantError: the others cannot be reached.
    """
    if not dist.is_torchelastic_launched():
        yield SOLO, device
        return
    backend = "gloo"
    if device.type == "cuda":
        place, found = dist.get_node_local_rank(), torch.cuda.device_count()
        if str(device) != "cuda" or place >= found:  # a numbered one is not everyone's own
            raise ConfigError(
                f"{device} for several processes, of {found} GPUs",
                remedy="give --device cuda, and torchrun no more processes a machine than it has GPUs",
            )
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    with _together():
        # torchrun ends all when one ends; the patience is for one that works while the others wait
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    try:
        yield Team(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    """What breaks between processes is the end of one of them, which has said why."""
    try:
        yield
    except RuntimeError as error:
        said = (str(error).splitlines() or [""])[0]
        raise AlphaQuantError(
            f"another process of this run has ended, or cannot be reached: {said.rpartition('] ')[2][:120]}",
            remedy="look at what it says; the same command goes on from the last layer",
        ) from error


def _bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor, whatever its type."""
    return x.view(-1).view(torch.uint8)


def _described(dtype: torch.dtype, shape: Sequence[int]) -> list[Any]:
    return [list(shape), str(dtype).removeprefix("torch.")]


def _known(described: Any) -> tuple[torch.Size, torch.dtype]:
    shape, dtype = described
    return torch.Size(shape), getattr(torch, dtype)
