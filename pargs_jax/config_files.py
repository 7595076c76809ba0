"""Configs as YAML files: how one is written, and strictly read back.

    config = from_mapping(TrainConfig, read_yaml("run.yaml"), "run.yaml")

A mistake raises InputError with one line that names the option, what was got, and what would be right.
"""

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_type_hints

import yaml

from pargs_jax.errors import InputError, input_errors_named_after
from pargs_jax.names_elsewhere import ELSEWHERE
from pargs_jax.options import Option, options, sections, shown

DEEPEST = 32
"""The most levels of a config file."""


class Config(Protocol):
    """A frozen dataclass whose fields are options, or sections that hold options; all have defaults."""

    def validate(self) -> None:
        """Raises InputError for values that cannot be used."""


C = TypeVar("C", bound=Config)


def from_mapping(config_class: type[C], mapping: Mapping[str, Any], where: str) -> C:
    """The config that a nested mapping describes, such as one read from YAML, validated.

    Raises InputError for an unknown key, a value of the wrong type or one that cannot be used; the message begins with
    `where`, the file or place that the mapping comes from.
    """
    config = build(config_class, read_options(config_class, mapping, f"{where}: "))
    with input_errors_named_after(where):
        config.validate()
    return config


def to_yaml(config: Config) -> str:
    """Every option of `config`, as a YAML document that loads back as an equal config."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def to_short_yaml(config: Config) -> str:
    """The options of `config` that differ from their defaults, as a YAML document; empty if none does."""
    changed = _changed(asdict(config), asdict(type(config)()))
    return yaml.safe_dump(changed, sort_keys=False, allow_unicode=True) if changed else ""


def _changed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    pairs = {name: (value, defaults[name]) for name, value in values.items() if value != defaults[name]}
    return {
        name: _changed(value, default) if isinstance(value, dict) else value for name, (value, default) in pairs.items()
    }


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises InputError if the file cannot be read, is not valid YAML, repeats a key, or does not hold a mapping.
    """
    try:
        content = yaml.load(Path(path).read_bytes(), Loader=_StrictLoader)
    except OSError as error:
        raise InputError(f"{path}: cannot read the config file ({error.strerror})") from None
    except yaml.MarkedYAMLError as error:
        place = f"{path}: line {error.problem_mark.line + 1}" if error.problem_mark else str(path)
        raise InputError(f"{place}: not a valid config file ({error.problem})") from None
    except Exception as error:  # bytes that are not text, a date that does not exist, and what PyYAML does not foresee
        raise InputError(f"{path}: not a valid config file ({' '.join(str(error).split())})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: got {shown(content)}, must be a mapping of options, such as 'seed: 1'")
    return content


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader, except that three things are errors: a key given twice, of which the last would win; an alias, which
    may make a value that contains itself; and deep nesting, which Python cannot handle later."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not supported", problem_mark=mark)
        if self._depth == DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"nested more than {DEEPEST} levels deep", problem_mark=mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"key {key.value} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node


def nearest(typed: str, names: Sequence[str]) -> str | None:
    """The name that was probably meant: the same in another section (`lr`: `optim.lr`), the one that another tool calls
    so (`learning_rate`), or else the most similar."""
    typed = typed.replace("-", "_")
    last_part = typed.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last_part]
    same += [name for name in ELSEWHERE.get(last_part, ()) if name in names]
    return (same or difflib.get_close_matches(typed[:100], names, n=1, cutoff=0.5) or [None])[0]


def read_options(config_class: type, mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The option values in a nested mapping by dotted key, converted and checked one by one."""
    known = {option.key: option for option in options(config_class)}
    return {
        key: converted(known[key], value, where + key)
        for key, value in _leaves(mapping, list(known), sections(config_class), where)
    }


def _leaves(
    mapping: Mapping[str, Any], known: Sequence[str], sections: Iterable[str], where: str, section: str = ""
) -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        key = f"{section}.{name}" if section else str(name)
        is_path = "." in str(name)  # sections nest: a dotted key would be a second way to say the same
        if key in sections and not is_path:
            if not isinstance(value, Mapping | None):  # a section whose lines are all commented out is None
                raise InputError(f"{where}{key}: got {shown(value)}, must be a mapping of options")
            yield from _leaves(value or {}, known, sections, where, key)
        elif key in known and not is_path:
            yield key, value
        else:
            home, _, leaf = (nearest(key, known) or "").rpartition(".")
            place = f" under '{home}'" if home else ""
            hint = f"did you mean '{leaf}'{place}?" if leaf else "no option has a name like it"
            raise InputError(f"{where}{key}: unknown key, got {shown(value)}; {hint}")


def converted(option: Option, value: Any, name: str) -> Any:
    """`value` as the option's type, if the conversion loses nothing; the error calls the option `name`."""
    if option.many and value is not None:
        several = value if isinstance(value, list | tuple) else [value]
        value = tuple(_as_scalar(option, each) for each in several)
    else:
        value = _as_scalar(option, value)
    option.require(value, name)
    return value


def _as_scalar(option: Option, value: Any) -> Any:
    """An int or a text like `1e-4`, which PyYAML does not take for a number, as float; all else as it is."""
    if option.scalar is not float or isinstance(value, bool) or not isinstance(value, int | str):
        return value
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value


def from_text(option: Option, word: Any) -> Any:
    """The value that YAML would have read for a word of a command line, or for each of a list; bools stay as they
    are."""
    if isinstance(word, list):
        return [from_text(option, each) for each in word]
    if not isinstance(word, str):
        return word
    if option.nullable and word.lower() in ("null", "none"):
        return None
    if option.scalar is bool:
        return {"true": True, "false": False}.get(word, word)
    try:
        return int(word) if option.scalar is int else word
    except ValueError:
        return word


def build(config_class: type[C], values: Mapping[str, Any], section: str = "") -> C:
    """A config with these option values, by dotted key, and defaults elsewhere. Nothing is checked."""
    hints = get_type_hints(config_class)
    arguments = {}
    for name in (declared.name for declared in fields(config_class)):
        key = f"{section}.{name}" if section else name
        if is_dataclass(hints[name]):
            arguments[name] = build(hints[name], values, key)
        elif key in values:
            arguments[name] = values[key]
    return config_class(**arguments)
