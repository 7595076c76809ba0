"""The options of training data, `--data.*`, and what all data have in common: columns, prompt formats, the demo."""
# ruff: noqa: RUF009 (option() is dataclasses.field(), a declaration and no shared value)

from dataclasses import dataclass
from typing import Literal

from pargs_jax.errors import InputError
from pargs_jax.options import option, shown

DEMO = "demo"  # names the built-in task and its language model; a folder of that name is "./demo"

NO_CACHE = "off"  # names no folder; a folder of that name is "./off"

PromptFormName = Literal["hh", "tldr", "shp", "saferlhf", "chat", "plain"]
PROMPT_COLUMNS = ("id", "prompt", "chosen", "rejected")
COLUMNS = (*PROMPT_COLUMNS, "response", "completion", "messages", "text", "reward", "labels", "split")


def column_names(words: tuple[str, ...], flag: str, known: tuple[str, ...] = COLUMNS) -> dict[str, str]:
    """What `NAME=COLUMN` words say: by which name of its own a source calls each column. Raises InputError for a word
    of another shape, a name that is not known, and a name or a column given twice."""
    columns: dict[str, str] = {}
    for word in words:
        name, _, column = word.partition("=")
        if name not in known or not column:
            raise InputError(f"{flag}: got {shown(word)}, must be NAME=COLUMN, with a NAME of {', '.join(known)}")
        if name in columns or column in columns.values():
            raise InputError(f"{flag}: {shown(name if name in columns else column)} is given twice")
        columns[name] = column
    return columns


@dataclass(frozen=True)
class DataConfig:
    """The preference pairs, or scored answers."""

    train: str = option(
        DEMO,
        "pairs to train on, or what the objective reads (prompts; scored answers: prompt, response, reward, or a "
        "file that decode.py wrote with one reward model): 'demo' (generated), a JSONL(.gz), JSON, CSV or Parquet "
        "file, or a hub id",
        metavar="FILE_OR_HUB_ID",
    )
    eval: str | None = option(
        None,
        "held-out pairs to evaluate on",
        unset="the demo's own with the demo, else --data.held-out",
        metavar="FILE_OR_HUB_ID",
        may_change=True,
    )
    columns: tuple[str, ...] = option(
        (), "the files' names for columns, where they differ: prompt=question chosen=best", metavar="NAME=COLUMN"
    )
    format: PromptFormName | None = option(
        None,
        "prompt format; it is saved with the model and used again in decoding",
        unset="the one that --model.init was trained with, else plain",
    )
    prefix_tokenizer: str | None = option(
        None,
        "language model whose tokenizer decides where the prefixes of answers end, as in decoding; for models with "
        "full attention",
        unset="the reward model's own tokenizer",
        metavar="PATH_OR_HUB_ID",
    )
    held_out: float = option(
        0.0,
        "share of the training rows to evaluate on instead, where --data.eval is not given; rows with the same prompt "
        "stay together",
        at_least=0,
        below=1,
    )
    cache: str | None = option(
        None,
        "folder that keeps tokenised rows for the next start; several processes must share it; 'off': keep none, and "
        "every process tokenises all rows, in memory",
        unset="$PARGS_JAX_CACHE, else ~/.cache/pargs_jax",
        metavar="DIR",
        may_change=True,
    )
    demo_pairs: int = option(3200, "pairs, or prompts, that the demo task generates for training", at_least=1)

    def validate(self) -> None:
        """Raises InputError for columns that no file can have, and for what is the demo's where it is not used."""
        if column_names(self.columns, "--data.columns") and self.train == DEMO and self.eval in (None, DEMO):
            raise InputError("--data.columns: has no effect on the demo; leave it out, or give a file as --data.train")
        if self.held_out and (self.eval is not None or self.train == DEMO):
            rival = "the demo has held-out pairs of its own" if self.eval is None else f"--data.eval is {self.eval}"
            raise InputError(f"--data.held-out: got {self.held_out:g}, but {rival}; leave one of them out")
        if self.train != DEMO and self.demo_pairs != DataConfig.demo_pairs:
            raise InputError(
                f"--data.demo-pairs: got {self.demo_pairs}, but the pairs come from --data.train {self.train}; "
                "leave it out, or train on the demo"
            )
