"""Files that a stranger may have written: each is read, or refused by one of our errors, soon and in little memory.

python tests/soak/fuzz.py 20000             so many cases, over all kinds of files
python tests/soak/fuzz.py 500 --seed 1
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from alphaquant.calibration import calibration_tokens, load_tokenizer
from alphaquant.checkpoint import Checkpoint, read_safetensors
from alphaquant.errors import AlphaQuantError
from alphaquant.models import detect, logical
from alphaquant.pipeline.manifest import Manifest
from alphaquant.pipeline.run import resolve_plan
from alphaquant.plan import Plan
from pipeline import tiny

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_SECONDS = 5.0
MOST_BYTES = 1 << 30

_NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 3, 63, 64, 65, 2**31, 2**63, 2**64, 10**9, 10**30, -(2**63), 1.5, 1e308, 1e-320]),
    st.sampled_from([float("nan"), float("inf"), -0.0, True, False]),
    st.integers(-10, 300),
)
_TEXTS = st.one_of(
    st.sampled_from(
        ["", "*", "**", "model.layers.*", "../x.safetensors", "/etc/passwd", "int4", "F32", "\ud800", "\0"]
    ),
    st.text(max_size=20),
    st.just("a" * 100_000),
)
_JUNK = st.recursive(
    st.one_of(st.none(), _NUMBERS, _TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_TEXTS, inner, max_size=4)),
    max_leaves=8,
)


@st.composite
def changed(draw: Any, whole: Any) -> Any:
    """An object of JSON in which some values are replaced, removed, renamed or doubled."""
    whole = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        holder, key = None, None
        value = whole
        while isinstance(value, dict | list) and value and (holder is None or draw(st.booleans())):
            holder = value
            key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
            value = value[key]
        if holder is None:
            return draw(_JUNK)
        deed = draw(st.sampled_from(["replace", "replace", "remove", "rename", "nest"]))
        if deed == "replace":
            holder[key] = draw(_JUNK)
        elif deed == "remove":
            del holder[key]
        elif deed == "nest":
            holder[key] = [value]
        elif isinstance(holder, dict):
            holder[draw(_TEXTS)] = holder.pop(key)
    return whole


@st.composite
def bytes_of(draw: Any, whole: Any) -> bytes:
    """A file that holds an object of JSON: changed as an object, or as bytes, or something else altogether."""
    kind = draw(st.sampled_from(["object", "object", "object", "bytes", "cut", "deep", "other"]))
    if kind == "deep":
        depth = draw(st.sampled_from([40, 200, 2000, 200_000]))
        return b'{"a":' * depth if draw(st.booleans()) else b"[" * depth + b"]" * depth
    if kind == "other":
        return draw(st.binary(max_size=200))
    text = json.dumps(draw(changed(whole)) if kind == "object" else whole).encode()
    if kind == "cut":
        return text[: draw(st.integers(0, len(text)))]
    if kind == "bytes":
        place = draw(st.integers(0, len(text) - 1))
        return text[:place] + draw(st.binary(max_size=3)) + text[place + draw(st.integers(0, 3)) :]
    return text


class Files:
    """A valid file of every kind, and how each is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny.write_model(folder / "model", "olmoe", shards=2)
        self.specs = {family: detect(config) for family, config in tiny.CONFIGS.items()}
        self.token_model = shutil.copytree(self.model, folder / "tokens")
        template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
        (self.token_model / "chat_template.jinja").write_text(template)
        header = {"__metadata__": {"format": "pt"}, "b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
        self.header = header | {"a": {"dtype": "I64", "shape": [2], "data_offsets": [24, 40]}}
        self.index = json.loads((self.model / "model.safetensors.index.json").read_text())
        few = dict(list(self.index["weight_map"].items())[:6])
        self.indices = [self.index, {"metadata": {}, "weight_map": few}]
        self.manifest = {
            "num_shards": 2,
            "identity": {"recipe": {"effort": "fast"}},
            "sessions": [{"started": "", "from_shard": 0}],
            "shards": [{"name": "a.safetensors", "num_bytes": 1, "sha256": "0", "tensor_names": ["x"]}],
            "files": {"config.json": "0"},
            "stream": None,
            "seconds": {"total": 1.0},
            "version": 1,
        }

    def plan(self, data: bytes) -> None:
        """A plan, resolved on a model."""
        path = self.folder / "plan.json"
        path.write_bytes(data)
        resolve_plan(Plan.load(path), self.specs["olmoe"])

    def config(self, data: bytes) -> None:
        """A config.json, with the weights of a model beside it."""
        (self.model / "config.json").write_bytes(data)
        checkpoint = Checkpoint.open(self.model)
        logical(checkpoint, detect(checkpoint.config))

    def safetensors(self, data: bytes) -> None:
        """A header, with bytes behind it."""
        path = self.folder / "x.safetensors"
        path.write_bytes(len(data).to_bytes(8, "little") + data + b"\0" * 40)
        read_safetensors(path)

    def raw_safetensors(self, data: bytes) -> None:
        """A file whose very length field may lie."""
        path = self.folder / "y.safetensors"
        path.write_bytes(data)
        read_safetensors(path)

    def shard_index(self, data: bytes) -> None:
        """An index, with the shards of a model beside it."""
        (self.model / "config.json").write_text(json.dumps(tiny.CONFIGS["olmoe"]))
        (self.model / "model.safetensors.index.json").write_bytes(data)
        try:
            Checkpoint.open(self.model)
        finally:
            (self.model / "model.safetensors.index.json").write_text(json.dumps(self.index))

    def token_rows(self, data: bytes) -> None:
        """Rows of token ids."""
        path = self.folder / "rows.json"
        path.write_bytes(data)
        calibration_tokens(str(path), None, num_samples=2, seqlen=4, seed=0, vocab_size=tiny.VOCAB)

    def tokenizer(self, data: bytes) -> None:
        """A tokenizer.json."""
        (self.token_model / "tokenizer.json").write_bytes(data)
        load_tokenizer(self.token_model).encode("w1 w2 w3")

    def conversations(self, data: bytes) -> None:
        """A line of conversation."""
        path = self.folder / "chat.jsonl"
        path.write_bytes(data + b'\n{"text": "w1 w2 w3 w4 w5 w6"}\n')
        shutil.copy(self.folder / "tokenizer.json", self.token_model / "tokenizer.json")
        tokenizer = load_tokenizer(self.token_model)
        calibration_tokens(str(path), tokenizer, num_samples=1, seqlen=2, seed=0, vocab_size=tiny.VOCAB)

    def run_manifest(self, data: bytes) -> None:
        """The manifest of a run."""
        (self.folder / "alphaquant").mkdir(exist_ok=True)
        (self.folder / "alphaquant/manifest.json").write_bytes(data)
        Manifest.read(self.folder)

    def targets(self) -> list[tuple[Callable[[bytes], None], Any]]:
        """Every reader, with files for it."""
        shutil.copy(self.model / "tokenizer.json", self.folder / "tokenizer.json")
        tokenizer = json.loads((self.folder / "tokenizer.json").read_text())
        tokenizer["model"]["vocab"] = {f"w{i}": i for i in range(5)} | {"[unk]": 5}
        length = st.sampled_from([0, 1, 8, 100, 2**31, 2**62, 2**63, 2**64 - 1]).map(lambda n: n.to_bytes(8, "little"))
        return [
            (self.plan, st.sampled_from(list(tiny.PLANS.values())).flatmap(bytes_of)),
            (self.config, st.sampled_from(list(tiny.CONFIGS.values())).flatmap(bytes_of)),
            (self.safetensors, bytes_of(self.header)),
            (self.raw_safetensors, st.tuples(length, st.binary(max_size=64)).map(b"".join)),
            (self.shard_index, st.sampled_from(self.indices).flatmap(bytes_of)),
            (self.token_rows, bytes_of([[1, 2, 3, 4], [5, 6, 7, 8]])),
            (self.tokenizer, bytes_of(tokenizer)),
            (self.conversations, bytes_of({"messages": [{"role": "user", "content": "w1"}]})),
            (self.run_manifest, bytes_of(self.manifest)),
        ]


def is_refused(read: Callable[[bytes], None], data: bytes) -> bool:
    """Whether a file is refused.

    Raises:
        AssertionError: it takes too long, or the refusal does not help.
    """
    start, error = time.process_time(), None  # the machine may have other work
    try:
        read(data)
    except AlphaQuantError as caught:
        error = caught
    spent = time.process_time() - start
    assert spent < MOST_SECONDS, f"{spent:.1f} s"
    assert error is None or (error.remedy and len(str(error)) < 5000), str(error)[:5000]
    return error is not None


def main(num_cases: int, number: int = 0) -> dict[str, int]:
    """Read so many files; returns how many of each kind were refused.

    Raises:
        AssertionError: one took too long or too much.
        Exception: one ended otherwise than by success or one of our errors.
    """
    refused: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        targets = Files(Path(scratch)).targets()
        begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for read, files in targets:

            def fuzz(data: bytes, read: Callable[[bytes], None]) -> None:
                refused[read.__name__] += is_refused(read, data)

            options = settings(
                max_examples=-(-num_cases // len(targets)),
                database=None,
                deadline=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            )
            seed(number)(options(given(data=files, read=st.just(read))(fuzz)))()
            grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begin)
            assert grown < MOST_BYTES, f"{read.__name__}: {grown >> 20} MiB"
    return dict(refused)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=int, help="files to read")
    parser.add_argument("--seed", type=int, default=0, help="draws them")
    given_options = parser.parse_args()
    sys.stdout.write(json.dumps(main(given_options.cases, given_options.seed)) + "\n")
