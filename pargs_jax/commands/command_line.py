"""The command line of a frozen dataclass of options (`pargs_jax.config`).

    config = parse(TrainConfig, prog="train.py", description="...", epilog="...")

Flags override the YAML file named by `--config`, which overrides the defaults. A mistake in either raises InputError
with one line that names the option, what was got, and what would be right.
"""

import argparse
import importlib.metadata
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from pargs_jax.commands.process import DEBUG
from pargs_jax.config_files import C, build, converted, from_text, nearest, read_options, read_yaml, to_short_yaml
from pargs_jax.errors import InputError
from pargs_jax.options import Option, options, sections, shown

if TYPE_CHECKING:
    from rich.console import Console

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
        SystemExit: with code 0, after `--help` and `--version`.
    """
    known = {option.key: option for option in options(config_class)}
    parser = _parser(config_class, prog, description, epilog)
    given, unknown = parser.parse_known_args(_dashed(sys.argv[1:] if argv is None else argv, known.values()))
    if unknown:
        raise _unknown_word(unknown[0], known.values())
    words = {key: word for key, word in vars(given).items() if key != "debug"}  # the process has seen that one
    if words.pop("version", False):
        print(f"pargs_jax {importlib.metadata.version('pargs-jax')}")
        sys.exit(0)
    config_file = words.pop("config", None)
    values = {} if config_file is None else read_options(config_class, read_yaml(config_file), f"{config_file}: ")
    for key, word in words.items():
        values[key] = converted(known[key], from_text(known[key], word), known[key].flag)
    config = build(config_class, values)
    config.validate()
    return config


def show_config(config: C, console: "Console", *more: str) -> None:
    """Prints the options that differ from their defaults, and more lines below them."""
    changed = to_short_yaml(config).rstrip() or "all options have their defaults (--help)"
    console.print("\n".join([changed, *filter(None, more)]), highlight=False, markup=False, style="dim")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are InputErrors."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))


def _parser(config_class: type, prog: str, description: str, epilog: str) -> Parser:
    """A parser that leaves words as text (`converted` reads them as it reads YAML) and only sets what was given."""
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
    general.add_argument("--version", action="store_true", help="print the version")
    general.add_argument(DEBUG, action="store_true", help="show where in the program an error came from")
    general.add_argument(
        "--config",
        metavar="F.yaml",
        help="read options from a YAML file: a key for each option, a mapping for each section, null to leave an "
        "option unset; flags override it",
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
    match = nearest(flag.lstrip("-"), [*(option.key for option in known), "config", "help", "version", "debug"])
    hint = f"did you mean --{match.replace('_', '-')}?" if match else "see --help"
    return InputError(f"{flag}: unknown option; {hint}")
