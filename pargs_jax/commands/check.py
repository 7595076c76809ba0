"""What models can be used for and what they cost, from their config.json alone: no weights are read or downloaded.
`python -m pargs_jax.commands.check MODEL ... --lm LANGUAGE_MODEL`."""

import math
from collections.abc import Sequence

import jax

from pargs_jax.commands.command_line import Parser
from pargs_jax.commands.process import run_as_command
from pargs_jax.errors import InputError
from pargs_jax.evaluation.cost import step_operations, token_operations
from pargs_jax.generation.reward_models import shares_tokens
from pargs_jax.models.deberta import LONGEST_TEXT
from pargs_jax.models.hf import describe_model, stored_head, stored_labels
from pargs_jax.models.model import Model
from pargs_jax.models.sources import tokenizer_folder
from pargs_jax.text.tokenization import TextTokenizer

SEEN = 512
"""The number of tokens that a counted token attends to."""
BYTES = 2
"""Of a number in bfloat16."""

COLUMNS = ("model", "family", "can be", "weights", "memory", "cache of a token", "context", "operations of a token")
GUIDE_COLUMNS = ("reads as a guide", "overhead")


def check(sources: Sequence[str], lm: str | None = None, k: int = 10) -> list[dict[str, str]]:
    """One row for each model, by `COLUMNS`; with a language model also by `GUIDE_COLUMNS`.

    Memory is that of the weights in bfloat16, and a cache's that of one token in one text. Operations are counted for
    one token that attends to 512. The overhead of a guide is in steps of the language model, with k candidates.

    Raises InputError for a model that cannot be used, with the reason.
    """
    language_model = None if lm is None else describe_model(lm, "vocabulary")
    rows = []
    for source in sources:
        head = stored_head(source)
        model = describe_model(source, head or "reward")
        row = dict(zip(COLUMNS, (source, *_facts(source, model, head)), strict=True))
        if language_model is not None:
            row |= dict(zip(GUIDE_COLUMNS, _as_guide(source, lm, language_model, k), strict=True))
        rows.append(row)
    return rows


def _facts(source: str, model: Model, head: str | None) -> tuple[str, ...]:
    config = model.config
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.abstract_params()))
    cache = 2 * config.layers * config.kv_heads * config.head_dim * BYTES
    return (
        type(config).__name__.removesuffix("Config"),
        _uses(source, model, head),
        _with_unit(weights),
        f"{_with_unit(weights * BYTES)}B",
        f"{_with_unit(cache)}B" if model.one_pass else "none",
        f"{config.context_length:,}{' and more' * (config.max_positions >= LONGEST_TEXT)}",
        _with_unit(token_operations(model, seen=SEEN)),
    )


def _uses(source: str, model: Model, head: str | None) -> str:
    if head == "vocabulary":
        return "language model, or start of a reward model"
    if head == "table":
        return "reward model (a table)"
    if head is None:
        return "start of a reward model"
    labels = stored_labels(source)
    return "reward model" if len(labels) < 2 else f"reward model by label: {', '.join(labels)}"


def _as_guide(source: str, lm: str, language_model: Model, k: int) -> tuple[str, str]:
    """How a model reads a language model's candidates as a scalar reward model, and its overhead."""
    model = describe_model(source, "reward")
    tokenizers = [_tokenizer(path) for path in (source, lm)]
    known = None if None in tokenizers else tuple(tokenizers)
    if shares_tokens(source, model, language_model.config.vocab_size, known):
        kind = "candidates, with a cache" + (", if the tokenizers are equal" if known is None else "")
    else:
        kind = "their text, with a cache" if model.one_pass else "their text, each from its beginning"
    return kind, f"{step_operations(language_model, model, text=SEEN, k=k).overhead:.2f}"


def _tokenizer(source: str) -> TextTokenizer | None:
    try:
        return TextTokenizer.load(tokenizer_folder(source))
    except InputError:
        return None


def _with_unit(number: float) -> str:
    """Three digits and a unit: 8.03 G."""
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} T"


def table(rows: Sequence[dict[str, str]]) -> str:
    """The rows as a table in Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = Parser(
        prog="python -m pargs_jax.commands.check",
        description="Say what models can be used for and what they cost, from config.json alone.",
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", help="runs of train.py, Hugging Face folders or hub ids")
    parser.add_argument("--lm", metavar="PATH", help="the language model that they would guide")
    parser.add_argument("--k", metavar="N", type=int, default=10, help="candidates a step (default: 10)")
    given = parser.parse_args()
    if given.k < 1:
        raise InputError(f"--k: got {given.k}, must be at least 1")
    print(table(check(given.models, given.lm, given.k)))


if __name__ == "__main__":
    run_as_command(main)
