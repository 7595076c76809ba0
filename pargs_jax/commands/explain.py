"""The page that explains answers, of trace files: `python -m pargs_jax.commands.explain TRACE.jsonl --out F.html`."""

from pathlib import Path

from pargs_jax.commands.command_line import Parser
from pargs_jax.commands.process import run_as_command
from pargs_jax.evaluation.explanation import write_page
from pargs_jax.generation.traces import read_traces


def main() -> None:
    parser = Parser(
        prog="python -m pargs_jax.commands.explain", description="Make a page that explains answers, from their traces."
    )
    parser.add_argument("trace", metavar="TRACE.jsonl", type=Path, help="traces of the answers (decode.py --trace)")
    parser.add_argument(
        "unguided",
        metavar="UNGUIDED.jsonl",
        type=Path,
        nargs="?",
        help="traces of unguided answers, to show next to them",
    )
    parser.add_argument("--out", metavar="F.html", type=Path, required=True, help="HTML file for the page")
    given = parser.parse_args()
    unguided = [] if given.unguided is None else list(read_traces(given.unguided))
    write_page(given.out, list(read_traces(given.trace)), unguided)


if __name__ == "__main__":
    run_as_command(main)
