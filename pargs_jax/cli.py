"""Strict YAML and a command line, both derived from a frozen dataclass of options (`pargs_jax.config`).

    config = parse(TrainConfig, prog="train.py", description="...", epilog="...")

Flags win over the YAML file named by `--config`, which wins over the defaults. A mistake in either raises InputError
with one line that names the option, what was got, and what would be right.
"""

import argparse
import difflib
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar, get_type_hints

import yaml

from pargs_jax.errors import InputError
from pargs_jax.options import Option, options, sections, shown


class Config(Protocol):
    """A frozen dataclass whose fields are options, or sections that hold options; all have defaults."""

    def validate(self) -> None:
        """Raises InputError for values that cannot be used."""


C = TypeVar("C", bound=Config)

_METAVARS = {int: "N", float: "X", str: "TEXT"}


def parse(
    config_class: type[C], argv: Sequence[str] | None = None, *, prog: str, description: str, epilog: str = ""
) -> C:
    """The config that a command line asks for, validated.

    Args:
        config_class: a frozen dataclass of options; its sections become dotted flags (`--optim.lr`).
        argv: the words after the command's name; None for those of this process.
        prog: the command, as shown in `--help`.
        description: what the command does, shown above the options and wrapped.
        epilog: examples, shown below the options as they are.

    Raises:
        InputError: an unknown option or YAML key, a value of the wrong type, or one that cannot be used.
        SystemExit: with code 0, after `--help`.
    """
    known = {option.key: option for option in options(config_class)}
    parser = _parser(config_class, prog, description, epilog)
    given, unknown = parser.parse_known_args(_dashed(sys.argv[1:] if argv is None else argv, known.values()))
    if unknown:
        raise _unknown_word(unknown[0], known.values())
    words = vars(given)
    config_file = words.pop("config", None)
    values = {} if config_file is None else _read(config_class, read_yaml(config_file), f"{config_file}: ")
    for key, word in words.items():
        values[key] = _converted(known[key], _from_text(known[key], word), known[key].flag)
    config = _build(config_class, values)
    config.validate()
    return config


def from_mapping(config_class: type[C], mapping: Mapping[str, Any], where: str) -> C:
    """The config that a nested mapping describes, such as one read from YAML, validated.

    Raises:
        InputError: an unknown key, a value of the wrong type or one that cannot be used; the message begins with
            `where`, the file or place that the mapping comes from.
    """
    config = _build(config_class, _read(config_class, mapping, f"{where}: "))
    try:
        config.validate()
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return config


def to_yaml(config: Config) -> str:
    """Every option of `config`, as a YAML document that loads back as an equal config."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        InputError: the file cannot be read, is no valid YAML, repeats a key, or holds something else than a mapping.
    """
    try:
        content = yaml.load(Path(path).read_bytes(), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise InputError(f"{path}: cannot read the config file ({error.strerror})") from None
    except yaml.MarkedYAMLError as error:
        place = f"{path}: line {error.problem_mark.line + 1}" if error.problem_mark else str(path)
        raise InputError(f"{place}: not a valid config file ({error.problem})") from None
    except (yaml.YAMLError, ValueError) as error:  # bytes that are no text; a date that is none
        raise InputError(f"{path}: not a valid config file ({' '.join(str(error).split())})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: got {shown(content)}, must be a mapping of options, such as 'seed: 1'")
    return content


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader, except that a key given twice is an error instead of the last one winning."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"key {key.value} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node


class Parser(argparse.ArgumentParser):
    """A parser whose errors are InputErrors."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))


def _parser(config_class: type, prog: str, description: str, epilog: str) -> Parser:
    """A parser that leaves words as text (`_converted` reads them as it reads YAML) and only sets what was given."""
    width = max(shutil.get_terminal_size().columns - 2, 40)
    parser = Parser(
        prog=prog,
        usage=f"{prog} [--config F.yaml] [options]",
        description=textwrap.fill(description, width),
        epilog=epilog,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=width),
        argument_default=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
    )
    general = parser.add_argument_group("general")
    general.add_argument("-h", "--help", action="help", help="show this text")
    general.add_argument(
        "--config",
        metavar="F.yaml",
        help="take options from a YAML file: one key an option, one mapping a section, null for an option left unset; "
        "flags win over it",
    )
    groups = {
        section: parser.add_argument_group(section, section_class.__doc__) if section else general
        for section, section_class in sections(config_class).items()
    }
    for option in options(config_class):
        settings: dict[str, Any] = {"dest": option.key, "help": _help_line(option)}
        if option.scalar is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["metavar"] = option.metavar or ("NAME" if option.choices else _METAVARS[option.scalar])
        if option.many:
            settings |= {"nargs": "+", "action": "extend"}
        groups[option.key.rpartition(".")[0]].add_argument(option.flag, **settings)
    return parser


def _help_line(option: Option) -> str:
    default = option.unset if option.default in (None, ()) else option.default
    if option.scalar is bool:
        default = "yes" if default else "no"
    elif isinstance(default, float):
        default = f"{default:g}"
    choices = f"choices: {', '.join(option.choices)}; " if option.choices else ""
    return f"{option.meaning} ({choices}default: {default})".replace("%", "%%")


def _dashed(argv: Sequence[str], known: Iterable[Option]) -> list[str]:
    """The command line with `--batch_size` respelled `--batch-size`, values untouched."""
    spellings = {}
    for option in known:
        for prefix in ("--", "--no-"):
            spellings[prefix + option.key] = prefix + option.flag.removeprefix("--")
    parts = (word.partition("=") for word in argv)
    return [spellings.get(name, name) + equals + value for name, equals, value in parts]


def _unknown_word(word: str, known: Iterable[Option]) -> InputError:
    if not word.startswith("-"):
        return InputError(f"unexpected argument {shown(word)}; options begin with -- (see --help)")
    flag = word.partition("=")[0]
    names = [option.flag.removeprefix("--") for option in known]
    match = _nearest(flag.lstrip("-"), [*names, "config", "help"])
    return InputError(f"{flag}: unknown option; " + (f"did you mean --{match}?" if match else "see --help"))


def _nearest(typed: str, names: Sequence[str]) -> str | None:
    """The name that was probably meant: the same in another section (`lr`: `optim.lr`), or else the most similar."""
    last_part = typed.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last_part]
    return (same or difflib.get_close_matches(typed, names, n=1, cutoff=0.5) or [None])[0]


def _read(config_class: type, mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The option values in a nested mapping by dotted key, converted and checked one by one."""
    known = {option.key: option for option in options(config_class)}
    return {
        key: _converted(known[key], value, where + key)
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
            home, _, leaf = (_nearest(key, known) or "").rpartition(".")
            place = f" under '{home}'" if home else ""
            hint = f"did you mean '{leaf}'{place}?" if leaf else "see --help"
            raise InputError(f"{where}{key}: unknown key, got {shown(value)}; {hint}")


def _converted(option: Option, value: Any, name: str) -> Any:
    """`value` as the option's type, where nothing is lost by it; `name` stands for the option in the error."""
    if option.many and value is not None:
        converted: Any = tuple(
            _as_scalar(option, each) for each in (value if isinstance(value, list | tuple) else [value])
        )
    else:
        converted = _as_scalar(option, value)
    option.require(converted, name)
    return converted


def _as_scalar(option: Option, value: Any) -> Any:
    """An int or a text like `1e-4`, which PyYAML does not take for a number, as float; all else as it is."""
    if option.scalar is not float or isinstance(value, bool) or not isinstance(value, int | str):
        return value
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value


def _from_text(option: Option, word: Any) -> Any:
    """What YAML would have read for a word of the command line; flags without a value come as bools."""
    if isinstance(word, list):
        return [_from_text(option, each) for each in word]
    if option.nullable and isinstance(word, str) and word.lower() in ("null", "none"):
        return None
    if option.scalar is int:
        try:
            return int(word)
        except ValueError:
            return word
    return word


def _build(config_class: type[C], values: Mapping[str, Any], section: str = "") -> C:
    hints = get_type_hints(config_class)
    arguments = {}
    for name in (declared.name for declared in fields(config_class)):
        key = f"{section}.{name}" if section else name
        if is_dataclass(hints[name]):
            arguments[name] = _build(hints[name], values, key)
        elif key in values:
            arguments[name] = values[key]
    return config_class(**arguments)
