"""The glob rule of a plan: which dotted module names a pattern means, and what was meant when it means none."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alphaquant.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

__all__ = ["Pattern", "compile_pattern", "did_you_mean", "generalise", "unknown_name", "unmatched"]

_TOKEN = re.compile(r"[*?]|\[[^\[\]]*\]|[^*?\[\]]+")
_REGEX_ONLY = re.compile(r"[\s(){}|^$+\\,:/]")
_NUMBER_RANGE = re.compile(r"[0-9]{2,}-[0-9]+|[0-9]+-[0-9]{2,}")
_INDEX = re.compile(r"(?<=\.)[0-9]+(?=\.|$)")
_INDEXED = re.compile(r"(?:^|\.)(layers|experts)\.([0-9]+)(?=\.|$)")
_NAME = re.compile(r"\w+(\.\w+)*")
_MAX_STARS = 12  # a regular expression with many stars can take exponential time
_EXAMPLES = "write dotted names with *, **, ?, [0-3], such as *.self_attn.* or model.layers.*.mlp.experts.*"


@dataclass(frozen=True, slots=True)
class Pattern:
    """A compiled glob over dotted module names."""

    text: str
    segments: tuple[str, ...]
    matches: Callable[[str], re.Match[str] | None]

    @property
    def literal(self) -> str | None:
        """The one name that it can match, when it holds no wildcard."""
        return None if any(map(_is_wild, self.segments)) else ".".join(self.segments)

    @property
    def names_last(self) -> bool:
        """Whether the last segment is literal, which is what reaches a protected module."""
        return not _is_wild(self.segments[-1])


def compile_pattern(text: str) -> Pattern:
    """Compile one glob.

    `*`, `?` and `[...]` stay within a segment and `**` crosses any number of them; a first segment that begins with
    `*` takes any prefix, a last one that ends with `*` the rest of the path; a trailing `.weight` is dropped.

    Raises:
        PlanError: the pattern is empty or malformed.
    """
    if not (name := text.removesuffix(".weight")):
        raise PlanError(f"the pattern {text!r} is empty", remedy=f"{_EXAMPLES}; ** means every module")
    if found := _REGEX_ONLY.search(name):
        raise _malformed(text, f"holds {found[0]!r}, and a pattern is a glob, not a regular expression")
    segments: list[str] = []
    for segment in name.split("."):
        if not segment:
            raise _malformed(text, "has an empty segment", "remove the extra dot")
        if segment != "**" and "**" in segment:
            raise _malformed(text, f"joins ** to other characters in {segment!r}", "put ** alone between dots")
        if segment != "**" or segments[-1:] != ["**"]:
            segments.append(segment)
    if name.count("*") > _MAX_STARS:
        raise _malformed(text, f"has more than {_MAX_STARS} stars", "use ** for several segments, or several rules")
    return Pattern(text, tuple(segments), re.compile(_regex(text, segments), re.DOTALL).fullmatch)


def _is_wild(segment: str) -> bool:
    return any(character in segment for character in "*?[")


def _malformed(text: str, why: str, remedy: str = _EXAMPLES) -> PlanError:
    return PlanError(f"the pattern {text!r} {why}", remedy=remedy)


def _regex(text: str, segments: Sequence[str]) -> str:
    out, after_segment = "", False
    for i, segment in enumerate(segments):
        is_last = i == len(segments) - 1
        if segment == "**":
            between = r"(?:.+\.)?" if not is_last else ".+"
            out += r"(?:\..+)?" if after_segment else between
            continue
        out += r"\." if after_segment else ""
        out += _segment_regex(text, segment, is_first=i == 0, is_last=is_last)
        after_segment = True
    return out


def _segment_regex(text: str, segment: str, *, is_first: bool, is_last: bool) -> str:
    if segment == "*":
        return ".+" if is_first or is_last else r"[^.]+"
    out, end = "", 0
    for token in _TOKEN.finditer(segment):
        if token.start() != end:
            break
        end = token.end()
        if token[0] == "*":
            is_wide = (is_first and token.start() == 0) or (is_last and end == len(segment))
            out += ".*" if is_wide else r"[^.]*"
        elif token[0] == "?":
            out += r"[^.]"
        elif token[0][0] == "[":
            out += _class_regex(text, token[0])
        else:
            out += re.escape(token[0])
    if end != len(segment):
        raise _malformed(text, f"has an unbalanced bracket in {segment!r}", "close it, as in [0-3]; no dot inside")
    return out


def _class_regex(text: str, token: str) -> str:
    body = token[1:-1].removeprefix("!")
    if not body:
        raise _malformed(text, f"has an empty class {token}", "list characters, as in [0-3] or [!01]")
    if _NUMBER_RANGE.search(body):
        why = f"has {token}, which is a class of single characters and not a range of numbers"
        raise _malformed(text, why, "for 10 to 15 write 1[0-5]; for 8 to 11 write two rules, [8-9] and 1[0-1]")
    out, i = "", 0
    while i < len(body):
        if body[i + 1 : i + 2] == "-" and i + 2 < len(body):
            if body[i] > body[i + 2]:
                raise _malformed(
                    text, f"has the range {body[i : i + 3]} in {token} backwards", "put the lower end first"
                )
            out += f"{re.escape(body[i])}-{re.escape(body[i + 2])}"
            i += 3
        else:
            out += re.escape(body[i])
            i += 1
    return rf"(?!\.)[{'^' if token[1] == '!' else ''}{out}]"


# --- Names: this model's, and those of every family -----------------------------------------------------------------

_PROJ = ("gate_proj", "up_proj", "down_proj")
_LAYER_ROLES = (
    *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "o", "q_a", "q_b", "kv_b")),
    *(f"self_attn.{n}" for n in ("kv_a_proj_with_mqa", "q_norm", "k_norm", "q_a_layernorm", "kv_a_layernorm")),
    *(f"{n}_layernorm" for n in ("input", "post_attention", "pre_feedforward", "post_feedforward")),
    *(f"mlp.{inner}{p}" for inner in ("", "shared_expert.", "shared_experts.") for p in _PROJ),
    *("mlp.gate", "mlp.shared_expert_gate", "block_sparse_moe.gate"),
)
_EXPERT_ROLES = (
    *(f"mlp.experts.{{}}.{p}" for p in _PROJ),
    *(f"block_sparse_moe.experts.{{}}.{p}" for p in ("w1", "w2", "w3")),
)


def generalise(name: str) -> str:
    """The name with every index replaced by `*`."""
    return _INDEX.sub("*", name)


def did_you_mean(close: Sequence[str]) -> str | None:
    """A question that offers these values, or None when there are none."""
    return "did you mean " + " or ".join(f'"{value}"' for value in close) + "?" if close else None


def unmatched(pattern: Pattern, where: str, names: Iterable[str]) -> str:
    """The warning for a pattern that matches none of `names` but would match in another family.

    Raises:
        PlanError: no family has such a module, or the model has no such layer or expert.
    """
    indices = _index_sets(names)
    if problem := _out_of_range(pattern, indices):
        raise PlanError(f"{pattern.text!r} matches no module: {problem}", where=where, remedy="use indices in range")
    wider = _widened(pattern, names)
    if _known_elsewhere(pattern, indices):
        why = "no module of this model, though other layers or families have such a module; it does nothing"
        return f"{where}: {pattern.text!r} matches {why}{f'; {wider} would' if wider else ''}"
    remedy = (
        (f"* stays within a segment: write {wider}" if wider else None)
        or did_you_mean(_suggest(pattern.text, names))
        or "compare it with the names of the model's modules"
    )
    raise PlanError(f"{pattern.text!r} matches no module", where=where, remedy=remedy)


def unknown_name(name: str, names: Iterable[str]) -> PlanError:
    """The error for a module name that is none of `names`."""
    known = set(names)
    indices = iter(_INDEX.findall(name))
    close = difflib.get_close_matches(generalise(name), sorted({generalise(n) for n in known}), n=1, cutoff=0.6)
    filled = [re.sub(r"\*", lambda _: next(indices, "*"), text) for text in close]
    remedy = did_you_mean([text if text in known else close[0] for text in filled])
    problem = _out_of_range(compile_pattern(name), _index_sets(known)) if _NAME.fullmatch(name) else None
    what = f"no module is named {name!r}" + (f": {problem}" if problem else "")
    return PlanError(what, where="the modules of this model", remedy=remedy or "list the modules to see their names")


def _widened(pattern: Pattern, names: Iterable[str]) -> str | None:
    """The pattern with `**` for each inner `*`, where that matches one of the names."""
    first, *inner = pattern.segments
    last = [inner.pop()] if inner else []
    text = ".".join([first, *("**" if segment == "*" else segment for segment in inner), *last])
    if text == pattern.text or text.count("*") > _MAX_STARS:
        return None
    wider = compile_pattern(text)
    return ".".join(wider.segments) if any(map(wider.matches, names)) else None


def _index_sets(names: Iterable[str]) -> dict[str, list[int]]:
    found: dict[str, set[int]] = {"layers": set(), "experts": set()}
    for name in names:
        for role, index in _INDEXED.findall(name):
            found[role].add(int(index))
    return {role: sorted(indices) for role, indices in found.items()}


def _out_of_range(pattern: Pattern, indices: Mapping[str, Sequence[int]]) -> str | None:
    """What to say when the pattern asks for a layer or an expert that the model does not have, else None."""
    for role, wanted in zip(pattern.segments, pattern.segments[1:], strict=False):
        have = indices.get(role)
        if not have or wanted == "**":
            continue
        matches = re.compile(_segment_regex(pattern.text, wanted, is_first=False, is_last=False)).fullmatch
        if not any(matches(str(index)) for index in have):
            return f"this model's {role} are {have[0]} to {have[-1]}, and {wanted} is none of them"
    return None


def _known_elsewhere(pattern: Pattern, indices: Mapping[str, Sequence[int]]) -> bool:
    """Whether the pattern would match a module of some family with this model's layers."""
    literal = {int(segment) for segment in pattern.segments if re.fullmatch("[0-9]{1,6}", segment)}
    experts = {*range(64), *literal}
    if indices["experts"]:
        experts = {expert for expert in experts if expert <= indices["experts"][-1]}
    return any(map(pattern.matches, _every_family(indices["layers"] or range(4), sorted(experts))))


def _every_family(layers: Iterable[int], experts: Sequence[int]) -> Iterator[str]:
    yield from ("lm_head", "model.embed_tokens", "model.norm")
    for layer in layers:
        for role in _LAYER_ROLES:
            yield f"model.layers.{layer}.{role}"
        for role in _EXPERT_ROLES:
            for expert in experts:
                yield f"model.layers.{layer}.{role.format(expert)}"


def _suggest(text: str, names: Iterable[str]) -> list[str]:
    """Up to three patterns close to `text`, every one of which matches some of `names`, indices as `*`."""
    candidates: set[str] = set()
    for whole in {generalise(name) for name in names}:
        segments = whole.split(".")
        for i, start in enumerate(segments):
            for j in range(i + 1, len(segments) + 1):
                if "*" not in (start, segments[j - 1]):
                    parts = ["*"] * (i > 0) + segments[i:j] + ["*"] * (j < len(segments))
                    candidates.add(".".join(parts))
    return difflib.get_close_matches(generalise(text), sorted(candidates), n=3, cutoff=0.6)
