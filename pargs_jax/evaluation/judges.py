"""Judges that give an answer a number: Python functions, reward models, and ROUGE against references.

A judge never takes other work down with it: an answer that it cannot score has no score, and `problems` says how many
there were and why.
"""

import importlib
import importlib.util
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from pargs_jax.data.sources import Rows
from pargs_jax.errors import InputError, first_line, warn
from pargs_jax.evaluation.answers import System
from pargs_jax.evaluation.scoring import ScoringModel
from pargs_jax.evaluation.text_metrics import rouge_l, rouge_n
from pargs_jax.text.tokenization import TextTokenizer

REFERENCE_COLUMNS = ("reference", "references", "chosen", "response", "completion")
"""Where a row may hold the reference answer, or several, first found first."""

Scores = list[float | None]


class Judge(Protocol):
    """Scores answers; higher is better.

    Attributes:
        name: what it is called in the report.
        meaning: what its number is.
        is_guide: whether it is known to have guided some of the answers, which the report then says.
        problems: answers without a score, counted by reason.
    """

    name: str
    meaning: str
    is_guide: bool
    problems: Counter[str]

    def scores(self, system: System) -> Scores:
        """The score of each of the system's answers; None where there is none."""


class FunctionJudge:
    """Any Python function that takes a prompt and a response and returns a number."""

    is_guide = False

    def __init__(self, name: str) -> None:
        """Imports it. `name` is `module:function` or `file.py:function`. Raises InputError if there is none."""
        self.function = load_function(name)
        self.name = name.rpartition(":")[2]
        self.meaning = f"the Python function {name}"
        self.problems: Counter[str] = Counter()

    def scores(self, system: System) -> Scores:
        return [self.score(answer.prompt, answer.response) for answer in system.answers]

    def score(self, prompt: str, response: str) -> float | None:
        """The function's number; None where it raises, or returns something that is not a finite number."""
        try:
            value = self.function(prompt, response)
            number = float(value)
        except Exception as error:  # a user's function may raise anything
            self.problems[f"{type(error).__name__}: {first_line(error)}"] += 1
            return None
        if not math.isfinite(number):
            self.problems[f"returned {number}"] += 1
            return None
        return number


def load_function(name: str) -> Callable[[str, str], float]:
    """The function that `module:function` or `file.py:function` names; modules are looked for here too.

    Raises InputError if there is none, or its module cannot be imported.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise InputError(f"function: got {name!r}, must be module:function or file.py:function")
    try:
        if place.endswith(".py"):
            if not Path(place).is_file():
                raise InputError(f"function {name}: {place} is not a file")
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            if "" not in sys.path:
                sys.path.insert(0, "")
            module = importlib.import_module(place)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"function {name}: cannot be imported ({type(error).__name__}: {first_line(error)})"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise InputError(f"function {name}: {place} has no function {attribute!r}")
    return function


class RewardModelJudge:
    """A reward model, which reads the texts in tokens of its own.

    An answer that ended by itself, or of which that is not known, is scored with the end-of-sequence token; one that
    was cut at its longest is not.
    """

    def __init__(
        self,
        source: str,
        *,
        is_guide: bool = False,
        dtype: str = "float32",
        weights: str | None = None,
        batch_size: int = 16,
        prefers_template: bool = False,
    ) -> None:
        """Loads it (`ScoringModel.load`). Raises InputError if it is not a reward model."""
        options = {"dtype": dtype, "weights": weights, "batch_size": batch_size, "prefers_template": prefers_template}
        self.model = ScoringModel.load(source, "reward", **options)
        self.name = source
        self.is_guide = is_guide
        self.meaning = f"the reward model {source}" + (", which guided some of the answers" if is_guide else "")
        self.problems: Counter[str] = Counter()

    def scores(self, system: System) -> Scores:
        """Raises InputError if the prompts are written in a chat template that the model does not share."""
        check_prompt_form(self.model, system)
        texts = [
            self.model.tokenise(answer.prompt, answer.response, closed=answer.is_whole is not False)
            for answer in system.answers
        ]
        fitting = [text for text in texts if text is not None]
        if len(fitting) < len(texts):
            self.problems[f"longer than its context of {self.model.model.config.max_positions} tokens"] += len(
                texts
            ) - len(fitting)
        rewards = iter(self.model.rewards(fitting))
        return [None if text is None else float(next(rewards)[0]) for text in texts]


def check_prompt_form(model: ScoringModel, system: System) -> None:
    """Warns where a model was trained with another prompt form than the answers' prompts are written in. Raises
    InputError where that is the chat template of a language model that writes it differently."""
    form = system.options.get("format")
    if form == "chat":
        lm = str(system.options.get("lm"))
        template = TextTokenizer.load(lm).chat_template if lm != "demo" else None
        if model.tokenizer.chat_template != template:
            raise InputError(
                f"{model.source}: the prompts in {system.source} are in the chat template of {lm}, which it does not "
                "share; judge by a reward model with the same template"
            )
    if None not in (form, model.prompt_form) and form != model.prompt_form and not model.renders_all:
        warn(
            f"{model.source}: was trained with the prompt format {model.prompt_form!r}, but {system.name} has {form!r}"
        )


class RougeJudge:
    """ROUGE-1, ROUGE-2 or ROUGE-L against references; with several, the best of them."""

    is_guide = False
    KINDS = ("rouge_1", "rouge_2", "rouge_l")

    def __init__(self, kind: str, references: Mapping[str, Sequence[str]]) -> None:
        """`references` are the reference answers to each prompt, by its id."""
        self.name = kind
        self.meaning = f"{kind.replace('_', '-').upper()} (F-measure) against the references"
        self.references = references
        self.problems: Counter[str] = Counter()

    def scores(self, system: System) -> Scores:
        return [self._score(answer.id, answer.response) for answer in system.answers]

    def _score(self, prompt_id: str, response: str) -> float | None:
        references = self.references.get(prompt_id, ())
        if not references:
            self.problems["no reference for the prompt"] += 1
            return None
        measure = rouge_l if self.name == "rouge_l" else lambda a, b: rouge_n(a, b, int(self.name[-1]))
        return max(measure(response, reference) for reference in references)


def load_references(source: str, columns: Mapping[str, str], systems: Sequence[System]) -> dict[str, list[str]]:
    """The reference answers by the id of their prompt, which is a row's `id`, or else its line, as in decoding.

    Raises InputError for a row without a reference, one whose prompt is not that of the answers of its id, or no row
    for any of the systems' prompts.
    """
    prompts = {answer.id: answer.prompt for system in systems for answer in system.answers}
    found: dict[str, list[str]] = {}
    for row in Rows(source, columns=columns):
        where = f"{source}: line {row.line}"
        if row.problem or not isinstance(row.content, dict):
            raise InputError(f"{where}: {row.problem or 'must be an object with named fields'}")
        name = next((name for name in REFERENCE_COLUMNS if row.content.get(name) is not None), None)
        if name is None:
            raise InputError(
                f"{where}: no reference; its column must be called {', '.join(REFERENCE_COLUMNS)}, or be named with "
                "the option references.columns, such as reference=summary"
            )
        value = row.content[name]
        texts = value if isinstance(value, list) else [value]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{where}: field {name!r} must be a text or a list of texts")
        named, prompt = row.content.get("id"), row.content.get("prompt")
        prompt_id = str(row.line if named is None else named)
        if isinstance(prompt, str) and prompt_id in prompts and prompt.strip() not in prompts[prompt_id]:
            raise InputError(f"{where}: its prompt differs from the prompt of the answers with the id {prompt_id!r}")
        found.setdefault(prompt_id, []).extend(texts)
    if not found.keys() & prompts.keys():
        raise InputError(f"{source}: no row has the id of an answered prompt")
    return found
