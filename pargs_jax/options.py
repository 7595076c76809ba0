"""How an option is declared: a dataclass field with its default, its meaning, its type and its limits.

YAML files (`pargs_jax.config_files`), the command line and `--help` (`pargs_jax.commands`) are derived from such
dataclasses, and `check_each` checks them when they are made from Python. Nothing here imports JAX, so `--help` answers
at once.
"""

import json
import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pargs_jax.errors import InputError

LARGEST_NUMBER = 2**31 - 1
"""The largest whole number that an option may be if it declares no limit: programs count in 32 bits."""
_COMPARISONS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
_KINDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


def option(
    default: Any,
    meaning: str,
    *,
    unset: str = "none",
    metavar: str = "",
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    may_be_empty: bool = False,
    may_change: bool = False,
) -> Any:
    """A dataclass field that is also an option of the command line and of YAML files.

    The field's type hint gives the kind of value: `bool`, `int`, `float`, `str`, a `Literal` of strings (the choices),
    any of these `| None`, or `tuple[T, ...]` for a list.

    Args:
        default: the value where none is given.
        meaning: the line in `--help`: what it is, and its unit.
        unset: what the default means where it is None or empty, in `--help`.
        metavar: what stands for the value in `--help`; by default the kind's.
        at_least, above, at_most, below: limits of a number.
        may_be_empty: whether the empty string is a value; elsewhere it is more likely an unset shell variable.
        may_change: whether a run that is resumed, or a file that is continued, may have another value: it does not
            change what the result is, only where or how fast or for how long it is made.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    limits = tuple((words, bound) for words, bound in bounds.items() if bound is not None)
    metadata = {
        "meaning": meaning,
        "unset": unset,
        "metavar": metavar,
        "limits": limits,
        "may_be_empty": may_be_empty,
        "may_change": may_change,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """What is known of one option of a config class.

    Attributes:
        key: its dotted name, as in YAML files: `optim.lr`.
        scalar: the type of its value, or of each element where `many`: bool, int, float or str.
        choices: the only values there are; empty for any.
        nullable: whether None is a value.
        many: whether it is a list (a tuple, in the dataclass).
        default, meaning, unset, metavar, limits, may_be_empty, may_change: as given to `option`.
    """

    key: str
    scalar: type
    choices: tuple[str, ...]
    nullable: bool
    many: bool
    default: Any
    meaning: str = ""
    unset: str = "none"
    metavar: str = ""
    limits: tuple[tuple[str, float], ...] = ()
    may_be_empty: bool = False
    may_change: bool = False

    @property
    def flag(self) -> str:
        """The option on the command line: `--optim.weight-decay` for `optim.weight_decay`."""
        return "--" + self.key.replace("_", "-")

    @property
    def expects(self) -> str:
        """What a value must be, in words: `a whole number, at least 1, or null`."""
        words = f"one of {', '.join(self.choices)}" if self.choices else _KINDS[self.scalar]
        if self.scalar is str and not self.choices and not self.may_be_empty:
            words = "non-empty " + words
        if self.limits:
            words += ", " + " and ".join(f"{comparison} {bound}" for comparison, bound in self.limits)
        return words + (", one or several" if self.many else "") + (", or null" if self.nullable else "")

    def require(self, value: object, name: str) -> None:
        """Raises InputError, naming the option `name`, unless `value` has the right type and lies within the limits."""
        if value is None:
            accepted = self.nullable
        elif self.many:
            accepted = isinstance(value, tuple) and all(map(self._accepts_scalar, value))
        else:
            accepted = self._accepts_scalar(value)
        if not accepted:
            raise InputError(f"{name}: got {shown(value)}, must be {self.expects}")
        is_limited = any(words in ("at most", "below") for words, _ in self.limits)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, str) and not _is_clean(each):
                raise InputError(f"{name}: got {shown(each)}, must be valid Unicode without NUL characters")
            if isinstance(each, int) and each > LARGEST_NUMBER and not is_limited:
                raise InputError(f"{name}: got {shown(each)}, must be at most {LARGEST_NUMBER}")

    def _accepts_scalar(self, value: object) -> bool:
        if self.choices:
            return value in self.choices
        if self.scalar is bool or isinstance(value, bool):  # a bool is an int to Python, but not to a reader
            return self.scalar is bool and isinstance(value, bool)
        if self.scalar is str:
            return isinstance(value, str) and (value != "" or self.may_be_empty)
        if not isinstance(value, int | float if self.scalar is float else int):
            return False
        is_finite = self.scalar is int or abs(value) <= sys.float_info.max  # of an int, too
        return is_finite and all(_COMPARISONS[words](value, bound) for words, bound in self.limits)


def _is_clean(text: str) -> bool:
    """Whether files and programs can take a text: half a surrogate pair cannot be written, and NUL ends a path."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def shown(value: object) -> str:
    """A value for an error message, as YAML would spell it, on one line and cut if long."""
    text = json.dumps(value, ensure_ascii=False, skipkeys=True, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def sections(config_class: type, prefix: str = "") -> dict[str, type]:
    """The class of every section of a config by its dotted name; the config itself is the section ""."""
    found = {prefix: config_class}
    for name, hint in get_type_hints(config_class).items():
        if is_dataclass(hint):
            found |= sections(hint, f"{prefix}.{name}" if prefix else name)
    return found


def options(config_class: type) -> Iterator[Option]:
    """Every option of a config class, section by section. Every field of the class needs a default."""
    for section, section_class in sections(config_class).items():
        hints = get_type_hints(section_class)
        for declared in fields(section_class):
            if not is_dataclass(hints[declared.name]):
                key = f"{section}.{declared.name}" if section else declared.name
                yield _described(key, declared, hints[declared.name])


def _described(key: str, declared: Field, hint: Any) -> Option:
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    (kind,) = (member for member in members if member is not NoneType)
    many = get_origin(kind) is tuple
    if many:
        kind = get_args(kind)[0]
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    scalar = str if choices else kind
    if scalar not in _KINDS:
        raise TypeError(f"{key}: an option cannot be of type {hint}")
    return Option(key, scalar, choices, NoneType in members, many, declared.default, **declared.metadata)


def check_each(config: Any) -> None:
    """Raises InputError for the first option of `config` that has a wrong type or lies outside its limits."""
    for known in options(type(config)):
        known.require(value_of(config, known), known.flag)


def deciding_values(config: Any) -> dict[str, Any]:
    """The values that decide what a run or a file of answers is, by key: those of all options that may not change when
    it is resumed."""
    return {known.key: value_of(config, known) for known in options(type(config)) if not known.may_change}


def value_of(config: Any, known: Option) -> Any:
    """The value of an option in a config."""
    return operator.attrgetter(known.key)(config)


def merged_options(classes: Mapping[str, type]) -> list[tuple[str, Any, Field]]:
    """The options of several classes as fields of one (`dataclasses.make_dataclass`). The meaning of each begins with
    the names of the classes that have it.

    Raises TypeError if two of them declare an option of one name differently.
    """
    merged: dict[str, tuple[Any, Field, list[str]]] = {}
    for name, options_class in classes.items():
        hints = get_type_hints(options_class)
        for declared in fields(options_class):
            hint, first, owners = merged.setdefault(declared.name, (hints[declared.name], declared, []))
            if (hint, first.default, first.metadata) != (hints[declared.name], declared.default, declared.metadata):
                raise TypeError(f"{name} and {owners[0]} declare the option {declared.name} differently")
            owners.append(name)

    def owned(first: Field, owners: Sequence[str]) -> Field:
        meaning = f"{', '.join(owners)}: {first.metadata['meaning']}"
        return field(default=first.default, metadata={**first.metadata, "meaning": meaning})

    return [(key, hint, owned(first, owners)) for key, (hint, first, owners) in merged.items()]
