"""One rule of a plan, checked on its own, and the strict reading of the JSON around it."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from alphaquant.errors import PlanError
from alphaquant.formats import FORMATS, UNQUANTIZED, Activation, ElementKind, parse_format
from alphaquant.patterns import compile_pattern, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["ACTIVATIONS", "LEAVE", "Override", "Rule", "read_json", "read_text", "validation_error"]

LEAVE = (*UNQUANTIZED, "fp16")
"""The values of `wq` that leave a module in the checkpoint's own precision."""

ACTIVATIONS = dict.fromkeys(UNQUANTIZED, Activation.BF16) | {activation.value: activation for activation in Activation}
"""The values of `aq`."""

_MAX_BYTES = 10_000_000
_MAX_DEPTH = 50
_SURROGATE = re.compile("[\ud800-\udfff]")


class Rule(BaseModel):
    """What a rule sets; None is "not set here", so an earlier rule's value stays."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    wq: StrictStr | None = Field(default=None, description="Weight format; bf16 or none leaves the module unquantized.")
    aq: StrictStr | None = Field(
        default=None, description="What inputs are rounded to as the model runs, token by token; bf16: nothing."
    )
    group_size: StrictInt | None = Field(default=None, description="Inputs that share a scale; -1 is one scale a row.")
    symmetric: StrictBool | None = Field(
        default=None, description="False adds a zero point to each group; integers only."
    )

    def settings(self) -> dict[str, str | int | bool]:
        """The keys that it sets, apart from its pattern and comment."""
        return self.model_dump(exclude_none=True, exclude={"pattern", "comment"})

    @field_validator("wq")
    @classmethod
    def _known_format(cls, wq: str | None) -> str | None:
        if wq is not None and wq not in LEAVE:
            try:
                parse_format(wq)
            except PlanError as error:
                raise _invalid(error.what, error.remedy) from None
        return wq

    @field_validator("aq")
    @classmethod
    def _known_activations(cls, aq: str | None) -> str | None:
        if aq is not None and aq not in ACTIVATIONS:
            why = "no engine computes it so" if aq in FORMATS else "it is not known"
            raise _invalid(f"aq is {_show(aq)}, and {why}", _REMEDIES["aq"])
        return aq

    @field_validator("group_size")
    @classmethod
    def _possible_group(cls, group_size: int | None) -> int | None:
        if group_size is not None and group_size < 1 and group_size != -1:
            raise _invalid(f"group_size is {_show(group_size)}", _REMEDIES["group_size"])
        return group_size

    @model_validator(mode="after")
    def _parts_agree(self) -> Rule:
        if self.wq in LEAVE and self.aq not in (None, *UNQUANTIZED):
            what = f'"aq": "{self.aq}" with wq "{self.wq}": inputs are rounded only where weights are quantized'
            raise _invalid(what, 'omit aq, or give wq "int8" or "fp8"')
        fmt = FORMATS.get(self.wq or "")
        if fmt is None:
            return self
        if self.symmetric is False and fmt.kind is not ElementKind.INT:
            what = f'"symmetric": false with wq "{fmt.name}", which has no zero point'
            raise _invalid(what, "omit symmetric, or choose an integer format")
        if fmt.has_one_group and self.group_size not in {None, fmt.native_group}:
            what = f'group_size {self.group_size} with wq "{fmt.name}", whose blocks are {fmt.native_group} wide'
            raise _invalid(what, "omit group_size, or choose another format")
        return self


class Override(Rule):
    """A rule for the modules that its pattern matches."""

    pattern: StrictStr = Field(description="Glob over dotted module names: *.self_attn.* or *.mlp.experts.*")
    skip: StrictBool | None = Field(
        default=None, description="True leaves the module unquantized; false takes that back."
    )
    comment: StrictStr | None = Field(default=None, description="For people; it changes nothing.")

    @property
    def leaves(self) -> bool:
        """Whether it leaves what it matches unquantized."""
        return self.skip is True or self.wq in LEAVE

    @field_validator("pattern")
    @classmethod
    def _well_formed(cls, pattern: str) -> str:
        try:
            compile_pattern(pattern)
        except PlanError as error:
            raise _invalid(error.what, error.remedy) from None
        return pattern

    @model_validator(mode="after")
    def _sets_something(self) -> Override:
        if not self.settings():
            what = f"the override {_show(self.pattern)} sets nothing"
            raise _invalid(what, "add wq, group_size, symmetric or skip, or delete the override")
        return self


# --- Errors ---------------------------------------------------------------------------------------------------------

_REMEDIES = {
    "wq": 'write a format name in quotes, such as "int4", or "bf16" to leave the module',
    "aq": 'write "bf16", "int8" or "fp8", the last two being dynamic by token, or omit aq',
    "group_size": 'write a positive integer, or -1 for one scale a row; blocks of 128 x 128 are "wq": "fp8_block"',
    "symmetric": "write true or false",
    "skip": "write true or false",
    "comment": "write a string in quotes",
    "$schema": "write a string in quotes",
    "pattern": 'add "pattern", a glob such as "*.mlp.experts.*"',
    "default": 'write an object, such as {"wq": "int4", "group_size": 128}',
    "overrides": 'write a list of objects, such as [{"pattern": "*.self_attn.*", "wq": "int8"}]',
}


def validation_error(error: ValidationError, where: str, keys: Mapping[str, Iterable[str]]) -> PlanError:
    """The first error of a validation, as one that names location, value and remedy.

    `keys` holds the known keys of the plan ("") and of the objects in "default" and "overrides".
    """
    first, *others = error.errors(include_url=False)
    path, value = first["loc"], first["input"]
    last = path[-1] if path else ""
    if first["type"] == "plan":
        what, remedy = first["ctx"]["what"], first["ctx"]["remedy"]
    elif first["type"] == "extra_forbidden":
        known = list(keys[str(path[0]) if len(path) > 1 else ""])
        hint = did_you_mean(difflib.get_close_matches(str(last).lower(), known, n=1))
        what, remedy = f"unknown key {_show(last)}", f"{hint or ''} known keys: {', '.join(known)}".strip()
    elif first["type"] == "missing":
        path = path[:-1]
        what, remedy = f"{last} is missing in {_show(value)}", _REMEDIES[str(last)]
    elif isinstance(last, int):
        what, remedy = f"an override is {_show(value)}", _REMEDIES["overrides"]
    else:
        what = f"{last or 'the plan'} is {_show(value)}"
        remedy = _REMEDIES.get(last, 'write a JSON object, such as {"default": {"wq": "int4"}}')
    if others:
        what += f" (and {len(others)} more error{'s' * (len(others) > 1)} in this plan)"
    return PlanError(what, where=_place(where, path), remedy=remedy)


def _invalid(what: str, remedy: str | None) -> PydanticCustomError:
    return PydanticCustomError("plan", "{what}; {remedy}", {"what": what, "remedy": remedy or ""})


def _show(value: object) -> str:
    """The value as JSON, shortened."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."


def _place(where: str, path: Sequence[str | int]) -> str:
    steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return f"{where}: {ascii(steps.lstrip('.'))[1:-1]}" if path else where


# --- JSON -----------------------------------------------------------------------------------------------------------


class _Object(dict[str, Any]):
    """A JSON object that remembers a key given twice."""

    repeated: str | None = None


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    found = _Object()
    for key, value in pairs:
        if key in found:
            found.repeated = key
        found[key] = value
    return found


def read_text(path: str | Path) -> str:
    """Read a plan file.

    Raises:
        PlanError: it is missing, unreadable, too large or not UTF-8.
    """
    where = str(path)
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise PlanError("the plan file does not exist", where=where, remedy="check the path") from None
    except OSError as error:
        what = f"the plan file cannot be read: {error.strerror}"
        raise PlanError(what, where=where, remedy="give a readable JSON file") from None
    if len(data) > _MAX_BYTES:
        raise _too_large(where)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"the plan is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}"
        raise PlanError(what, where=where, remedy="save it as UTF-8") from None


def read_json(text: str, where: str) -> Any:
    """Parse JSON, and refuse what is too large, too deep, ambiguous (a key twice) or null.

    Raises:
        PlanError: with line and column of a syntax error.
    """
    if len(text) > _MAX_BYTES:
        raise _too_large(where)
    try:
        data = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1 :][:1]
        what = f"not valid JSON: {error.msg}" + (f" in {_show(line[0].strip())}" if line else "")
        place = f"{where}: line {error.lineno}, column {error.colno}"
        raise PlanError(what, where=place, remedy="check commas, quotes and brackets there") from None
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError:  # an integer of thousands of digits
        raise PlanError("a number is too long", where=where, remedy=_REMEDIES["group_size"]) from None
    _walk(data, where)
    return data


def _walk(data: Any, where: str) -> None:
    stack: list[tuple[Any, tuple[str | int, ...]]] = [(data, ())]
    while stack:
        value, path = stack.pop()
        if len(path) > _MAX_DEPTH:
            raise _too_deep(where)
        if value is None:
            remedy = 'omit the key to inherit its value; "bf16" leaves a module unquantized'
            raise PlanError("null is no value of a plan", where=_place(where, path), remedy=remedy)
        if isinstance(value, _Object):
            if value.repeated is not None:
                what = f"the key {_show(value.repeated)} is given twice"
                raise PlanError(what, where=_place(where, path), remedy="keep one of them")
            stack += [(item, (*path, key)) for key, item in value.items()]
        elif isinstance(value, list):
            stack += [(item, (*path, i)) for i, item in enumerate(value)]
        elif isinstance(value, str) and _SURROGATE.search(value):
            remedy = "replace the lone \\ud800-\\udfff escape by a whole character"
            raise PlanError(f"{_show(value)} is not Unicode text", where=_place(where, path), remedy=remedy)


def _too_large(where: str) -> PlanError:
    remedy = "is this a plan? Use patterns in place of single names"
    return PlanError(f"the plan is larger than {_MAX_BYTES:,} bytes", where=where, remedy=remedy)


def _too_deep(where: str) -> PlanError:
    remedy = "a plan needs 3 levels: overrides, rule, value"
    return PlanError(f"the plan is nested deeper than {_MAX_DEPTH} levels", where=where, remedy=remedy)
