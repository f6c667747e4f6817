"""What a run is a function of, and its course from the last commit to the last shard."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from alphaquant.errors import ConfigError
from alphaquant.pipeline.closing import peak_memory_bytes, plain
from alphaquant.pipeline.convert import shard_names, shard_tensors
from alphaquant.pipeline.records import LayerRecord, require_quiet
from alphaquant.pipeline.stream import chunks
from alphaquant.pipeline.walk import quantize_shards

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from alphaquant.calibration import TokenBatch
    from alphaquant.layouts import Layout
    from alphaquant.pipeline.distributed import Team
    from alphaquant.pipeline.layer import LayerQuantizer
    from alphaquant.pipeline.log import Log
    from alphaquant.pipeline.run import Prepared
    from alphaquant.pipeline.rundir import RunDir
    from alphaquant.pipeline.solving import QuantizedLayer
    from alphaquant.pipeline.stream import Progress, Stream
    from alphaquant.solver import Recipe

__all__ = ["Course", "Job", "Watch", "require_equal"]

_LEFT_OUT = "left_out"  # kept beside the activations: the samples that go without


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that a run is a function of, and what it computes with."""

    prepared: Prepared
    recipe: Recipe
    layout: Layout
    tokens: TokenBatch | None
    device: torch.device
    dtype: torch.dtype

    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the result, as JSON; a stopped run goes on only with the same."""
        ids = None if self.tokens is None else {"shape": list(self.tokens.ids.shape), "digest": self.tokens.digest}
        return {"tokens": ids, **self.identity_without_tokens()}

    def identity_without_tokens(self) -> dict[str, Any]:
        """What is known of it before there are tokens."""
        checkpoint, plan = self.prepared.checkpoint, self.prepared.plan
        table = {name: str(scheme) for name, scheme in self.prepared.schemes.items() if scheme is not None}
        return {
            "checkpoint": {"headers": checkpoint.header_digest(), "weights": checkpoint.sample_digest()},
            "plan": plan.model_dump(mode="json", exclude={"comment", "schema_url"}, exclude_none=True),
            "formats": hashlib.sha256(json.dumps(table).encode()).hexdigest(),
            "layout": self.layout.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "rotation": self.prepared.rotation.to_dict(),
            "recipe": {key: value for key, value in plain(self.recipe).items() if key != "backend"},
            "alphaquant": ".".join(version("alphaquant-moe").split(".")[:2]),
        }


@dataclass(frozen=True, slots=True)
class Course:
    """A run under way.

    Attributes:
        job: what it is a function of.
        run: its directory; None in a process of a team that does not keep it.
        quantizer: of the model.
        begin: when it would have begun had it not been stopped in between.
        log: is told what happened.
        strict: make an error of every fallback and of everything left out.
    """

    job: Job
    run: RunDir | None
    quantizer: LayerQuantizer
    begin: float
    log: Log
    strict: bool

    def end(self) -> list[LayerRecord]:
        """Quantize and commit every shard that is not done yet.

        Returns the records of all shards; without a `run` only of those.
        """
        job, run, team = self.job, self.run, self.quantizer.team
        names, records = shard_names(job.prepared.spec, job.prepared.source), []
        if run is not None:
            records = [LayerRecord.from_dict(run.read_note(self._record(index))) for index in range(len(run.shards))]
        done: int = team.tell(len(records))[0]
        for record in records:
            self._look_at(record)
        if done == len(names):
            return records
        streams = team.stored({} if run is None else run.open_streams())
        left_out = streams.pop(_LEFT_OUT, None)
        self.quantizer.samples.left_out.update([] if left_out is None else left_out[:].tolist())
        walk = quantize_shards(
            self.quantizer,
            job.prepared.source,
            None if job.tokens is None else job.tokens.ids,
            device=job.device,
            dtype=job.dtype,
            done=done,
            streams=streams,
            scratch=None if run is None else run.path,
        )
        quantizer = self.quantizer
        with quantizer.behind.apart() if quantizer.limits.reads_ahead else nullcontext():
            for index, (result, behind) in enumerate(walk, done):
                for event in result.record.all_events():
                    self.log("fallback", module=event["module"], what=event["event"])
                self._look_at(result.record)
                self._commit(index, names[index], result, behind)
                records.append(result.record)
                del result  # its codes would lie beside the next layer's
            quantizer.settle()
        return records

    def _commit(self, index: int, names: list[str], result: QuantizedLayer, streams: Mapping[str, Stream]) -> None:
        """Pack what was quantized, and let it be written while the next layer is begun.

        The streams are written as they are until then: before one moves, the quantizer waits.
        """
        clock, team, run = self.quantizer.clock, self.quantizer.team, self.run
        self.quantizer.settle()
        with clock("pack"):
            own = self._own(names, result)
            refitted, read = result.refitted, self.job.prepared.source.read
            tensors = shard_tensors(
                own,
                result.quantized.get,
                self.job.layout,
                lambda name: refitted[name] if name in refitted else read(name),
            )
        with clock("share"):
            tensors = team.gather(tensors)
            for stream in streams.values():
                team.gather_turns(stream, chunks(*stream.shape[:2]))
        if run is None:
            return
        left_out = sorted(self.quantizer.samples.left_out)
        if streams and left_out:
            streams = {**streams, _LEFT_OUT: torch.tensor(left_out)}
        record = result.record

        def write() -> Callable[[], None]:
            run.write_note(self._record(index), record.to_dict())
            shard = run.add_shard(tensors)
            seconds = clock.seconds | {"total": time.perf_counter() - self.begin}
            run.commit(streams, seconds, peak_memory_bytes=peak_memory_bytes())
            facts = {"shard": shard.name, "bytes": shard.num_bytes, "sha256": shard.sha256}
            return lambda: self.log("commit", layer=record.layer, **facts)

        with clock("write"):
            self.quantizer.behind.do(write)

    def _look_at(self, record: LayerRecord) -> None:
        if self.strict:
            require_quiet(record)

    def _own(self, names: list[str], result: QuantizedLayer) -> list[str]:
        """The tensors of a shard that this process gives: what it quantized, and at the first one all that stays.

        The first one owns the head, and rounds the embedding itself.
        """
        team, schemes = self.quantizer.team, self.job.prepared.schemes
        if team.size == 1:
            return names
        own = []
        for name in names:
            module = name.removesuffix(".weight")
            is_quantized = name.endswith(".weight") and schemes.get(module) is not None
            if result.record.layer is None or not is_quantized:
                own += [name] if team.rank == 0 else []
            elif module in result.quantized:
                own.append(name)
        return own

    def _record(self, shard: int) -> str:
        is_layer = shard < self.job.prepared.spec.num_layers
        return f"records/layer-{shard:05d}.json" if is_layer else "records/outer.json"


class Watch:
    """Follows a run for its log: progress says of which layer a phase is, the clock how long it took."""

    def __init__(self, log: Log, progress: Progress, team: Team) -> None:
        self._log, self._progress, self._team = log, progress, team
        self.layer: int | None = None

    def __call__(self, phase: str, layer: int, num_layers: int, tokens: int = 0) -> None:
        """See `Progress`."""
        self.layer = layer
        self._progress(phase, layer, num_layers, tokens)

    def spent(self, phase: str, seconds: float, memory_bytes: int) -> None:
        """Told by the clock."""
        self.log("phase", phase=phase, seconds=round(seconds, 6), memory_bytes=memory_bytes)

    def log(self, event: str, **facts: Any) -> None:
        """Log with what is known of every event."""
        self._log(event, **{"layer": self.layer, **facts}, peak_memory_bytes=peak_memory_bytes(), rank=self._team.rank)


def require_equal(team: Team, identity: dict[str, Any]) -> None:
    """All processes of a team see the same model, plan and tokens.

    Raises:
        ConfigError: names the first that differ.
    """
    digests = {key: hashlib.sha256(json.dumps(value).encode()).hexdigest() for key, value in identity.items()}
    told = team.tell(digests)
    for rank, other in enumerate(told):
        differing = [key for key in told[0] if other.get(key) != told[0][key]]
        if differing:
            raise ConfigError(
                f"process {rank} has another {', '.join(differing)} than process 0",
                remedy="give every machine the same model, plan, calibration and version of alphaquant",
            )
