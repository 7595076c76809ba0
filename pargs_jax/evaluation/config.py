"""The options of `evaluate.py`. How an option is declared: `pargs_jax.options`."""
# ruff: noqa: RUF009 (option() is dataclasses.field(), a declaration and no shared value)

from dataclasses import dataclass
from typing import Literal

from pargs_jax.config import COMPILE_CACHE, MESH, MOST_ROWS, WeightFormat
from pargs_jax.data_config import COLUMNS, PromptFormName, column_names
from pargs_jax.errors import InputError
from pargs_jax.options import check_each, option

REFERENCE_NAMES = ("id", "prompt", "reference")


@dataclass(frozen=True)
class EndpointConfig:
    """A language model behind an OpenAI-compatible endpoint, asked which of two answers is better."""

    url: str | None = option(None, "address of the endpoint, such as http://localhost:8000/v1", metavar="URL")
    model: str | None = option(None, "the model's name at the endpoint", metavar="NAME")
    key_variable: str = option("OPENAI_API_KEY", "environment variable that holds the API key", metavar="NAME")
    instruction: str | None = option(
        None, "text file that says what makes an answer better", unset="helpful, correct and harmless", metavar="FILE"
    )
    cache: str | None = option(
        None,
        "file that keeps replies, so that nothing is asked twice",
        unset="replies.jsonl in --out",
        metavar="F.jsonl",
    )
    timeout: float = option(60.0, "seconds to wait for a reply", above=0)
    retries: int = option(4, "retries after a failure, each after a longer wait", at_least=0, at_most=100)
    parallel: int = option(8, "requests in flight at once", at_least=1, at_most=1024)
    temperature: float | None = option(0.0, "temperature of the replies", unset="the endpoint's", at_least=0)
    max_tokens: int | None = option(None, "longest reply, in tokens", unset="the endpoint's", at_least=1)

    def validate(self) -> None:
        """Raises InputError if an address comes without a model, or options without an address."""
        if self.url is not None and self.model is None:
            raise InputError("--endpoint.url: needs --endpoint.model NAME, the model's name at the endpoint")
        if self.url is None and self != EndpointConfig():
            raise InputError("--endpoint: needs --endpoint.url URL, such as http://localhost:8000/v1")


@dataclass(frozen=True)
class ReferencesConfig:
    """Reference answers, for ROUGE."""

    file: str | None = option(
        None,
        "file with a reference and the id of its prompt in each row; without ids, the line number is the id",
        metavar="FILE_OR_HUB_ID",
    )
    columns: tuple[str, ...] = option(
        (), "the file's names for columns, where they differ: reference=summary", metavar="NAME=COLUMN"
    )

    def validate(self) -> None:
        """Raises InputError for columns without a file."""
        if column_names(self.columns, "--references.columns", REFERENCE_NAMES) and self.file is None:
            raise InputError("--references.columns: needs --references.file, the file that has the columns")


@dataclass(frozen=True)
class PairsConfig:
    """Preference pairs to test the reward models themselves (--rm, --guide, --function), prefix by prefix."""

    file: str | None = option(
        None,
        "'demo' (generated), a JSONL(.gz), JSON, CSV or Parquet file, or a hub id; if it has splits, only the "
        "held-out rows are used",
        metavar="FILE_OR_HUB_ID",
    )
    columns: tuple[str, ...] = option(
        (), "the file's names for columns, where they differ: chosen=best", metavar="NAME=COLUMN"
    )
    format: PromptFormName | None = option(
        None,
        "prompt format",
        unset="the one that each reward model was trained with, else plain",
    )
    max_length: int = option(512, "most tokens of prompt and answer together; longer texts are cut", at_least=2)
    limit: int | None = option(None, "take only the first N pairs", unset="all", at_least=1)

    def validate(self) -> None:
        """Raises InputError for options without a file."""
        column_names(self.columns, "--pairs.columns", COLUMNS)
        if self.file is None and self != PairsConfig():
            raise InputError("--pairs: needs --pairs.file, the file of pairs")


@dataclass(frozen=True)
class EvaluateConfig:
    """The options of `evaluate.py`."""

    answers: tuple[str, ...] = option(
        (), "answers files of decode.py --out, each with its name in the report", metavar="[NAME=]F.jsonl"
    )
    baseline: str | None = option(
        None, "name of the answers to compare the others with", unset="the first", metavar="NAME"
    )
    out: str = option("runs/evaluation", "folder for the report", metavar="DIR")
    rm: tuple[str, ...] = option(
        (), "reward models as judges, which guided none of the answers: folders or hub ids", metavar="PATH"
    )
    guide: tuple[str, ...] = option(
        (), "reward models that score all answers although they guided some of them; the report says so", metavar="PATH"
    )
    function: tuple[str, ...] = option(
        (),
        "Python functions as judges, which take prompt and response and return a number; module:function or "
        "file.py:function",
        metavar="NAME",
    )
    perplexity: str | None = option(
        None, "another language model, which measures the perplexity of the answers", metavar="PATH_OR_HUB_ID"
    )
    decode: str | None = option(
        None, "options of decode.py that --sweep starts from", unset="decode.py's defaults", metavar="F.yaml"
    )
    sweep: tuple[str, ...] = option(
        (),
        "options of decode.py with their values: every combination is decoded and evaluated; answers from an "
        "earlier run are reused",
        metavar="NAME=VALUE,...",
    )
    seed: int = option(0, "seed of the bootstrap", at_least=0)
    figures: bool = option(True, "draw figures; needs the extra report")
    examples: int = option(10, "how many prompts the page shows with their answers", at_least=0)
    batch_size: int = option(16, "texts that a model reads together", at_least=1, at_most=MOST_ROWS)
    dtype: Literal["float32", "bfloat16"] = option("float32", "number format of the models' computation")
    rm_format: Literal["same", "auto"] = option(
        "same",
        "what reward models read as judges of answers: the prompt as its file has it ('same'), or 'auto': always in "
        "their own chat template, if they have one and do not remember another format; for pairs see --pairs.format",
    )
    rm_dtype: WeightFormat | None = option(
        None,
        "number format of the reward models' weights; with int8, the report on pairs says how well the rewards agree "
        "with those of --dtype",
        unset="that of --dtype",
    )
    mesh: str = option("auto", MESH, metavar="NAME")
    compile_cache: str | None = option(None, COMPILE_CACHE, metavar="DIR")
    endpoint: EndpointConfig = EndpointConfig()
    references: ReferencesConfig = ReferencesConfig()
    pairs: PairsConfig = PairsConfig()

    def validate(self) -> None:
        """Raises InputError, which names the command-line flag, for the first option that cannot be used."""
        check_each(self)
        self.endpoint.validate()
        self.references.validate()
        self.pairs.validate()
        if self.decode is not None and not self.sweep:
            raise InputError("--decode: needs --sweep NAME=VALUE,..., the settings to decode with")
        if not self.answers and not self.sweep and self.pairs.file is None:
            raise InputError(
                "nothing to evaluate: give --answers F.jsonl, or --sweep NAME=VALUE,... to decode them, or "
                "--pairs.file FILE to test reward models"
            )
        if self.pairs.file is not None and not (self.rm or self.guide or self.function):
            raise InputError("--pairs.file: needs reward models to test; give --rm PATH or --function NAME")
        if both := set(self.rm) & set(self.guide):
            raise InputError(f"--rm and --guide: got {min(both)} in both, must be in one of them")
