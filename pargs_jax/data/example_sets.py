"""Sets of examples, from a source to token ids, read as a stream and, by several processes, in shares."""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pargs_jax.data.examples import Cutting, Example, TruncationReport, grouped, nothing_left
from pargs_jax.data.preferences import BadRow, Preference, is_held_out, no_usable_rows, read_preferences
from pargs_jax.data.sources import WHOLE, Census, Rows, Share
from pargs_jax.errors import InputError
from pargs_jax.text.prompts import PromptForm
from pargs_jax.text.tokenization import TextTokenizer


@dataclass(frozen=True)
class Found:
    """What was found in the rows of a source; the sum is that of several shares.

    Attributes:
        usable: rows that are preferences.
        bad_rows: rows that are not; `first_bad` is the first of them, without its content.
        kept: usable rows of the side that was asked for, where a share of them is held out.
        examples: those that are left after truncation.
        census: the columns and splits.
        report: what was lost to the maximum length.
    """

    usable: int = 0
    bad_rows: int = 0
    first_bad: BadRow | None = None
    kept: int = 0
    examples: int = 0
    census: Census = field(default_factory=Census)
    report: TruncationReport = field(default_factory=TruncationReport)

    def __add__(self, other: "Found") -> "Found":
        return Found(
            self.usable + other.usable,
            self.bad_rows + other.bad_rows,
            self.first_bad or other.first_bad,
            self.kept + other.kept,
            self.examples + other.examples,
            self.census + other.census,
            self.report + other.report,
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it; `from_json` is the reverse."""
        census = {
            "columns": sorted(self.census.columns),
            "splits": list(self.census.splits.items()),
            "other_splits": self.census.other_splits,
        }
        return asdict(replace(self, census=Census())) | {"census": census}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Found":
        """What `to_json` was called on. Raises KeyError or TypeError for anything else."""
        census, first = values["census"], values["first_bad"]
        return Found(**{
            **values,
            "first_bad": None if first is None else BadRow(**first),
            "census": Census(set(census["columns"]), Counter(dict(census["splits"])), census["other_splits"]),
            "report": TruncationReport(**values["report"]),
        })  # fmt: skip


@dataclass(frozen=True)
class ExampleSet:
    """What a set of examples is made from.

    Attributes:
        source, split, columns: see `load_preferences`; so are the next four.
        form, require_rejected, reward_range, labels: how a row becomes a preference.
        cutting: how a preference becomes an example.
        samples: how many scored answers to one prompt make an example; 0: every row is an example.
        held_out: the share of the rows that is held out.
        side: whether the set is the held-out rows, or the rest, which is all if nothing is held out.
    """

    source: str
    split: str
    columns: Mapping[str, str]
    form: PromptForm
    require_rejected: bool
    reward_range: tuple[float, float] | None
    labels: int
    cutting: Cutting
    samples: int = 0
    held_out: float = 0.0
    side: Literal["rest", "held out"] = "rest"

    def read(
        self, share: Share, add: Callable[[Example], None], refuse: Callable[[BadRow], None] = lambda _: None
    ) -> Found:
        """Hands the examples of a share of the source to `add`, and its bad rows to `refuse`, one by one.

        Scored answers that are grouped by prompt are not read in shares: the first share is the whole, and is held in
        memory. Raises InputError for a source that cannot be read; `check` says whether what was found can be used.
        """
        if self.samples:
            if share.number:
                return Found()
            share = WHOLE
        rows = Rows(self.source, self.split, self.columns, share)
        usable = bad_rows = kept = examples = 0
        first_bad, report = None, TruncationReport()
        together: list[Preference] = []

        def use(group: list[Preference]) -> None:
            nonlocal examples, report
            example, lost = self.cutting.example(group)
            report += lost
            if example is not None:
                examples += 1
                add(example)

        shape = self.require_rejected, self.reward_range, self.labels
        for row in read_preferences(rows, self.form, self.cutting.tokenizer, *shape):
            if isinstance(row, BadRow):
                bad_rows += 1
                first_bad = first_bad or replace(row, row=None)
                refuse(row)
                continue
            usable += 1
            if self.held_out and is_held_out(row, self.held_out) != (self.side == "held out"):
                continue
            kept += 1
            if self.samples:
                together.append(row)
            else:
                use([row])
        if together:
            groups, left_over = grouped(together, self.samples)
            report += left_over
            for group in groups:
                use(group)
        return Found(usable, bad_rows, first_bad, kept, examples, rows.census, report)

    def check(self, found: Found) -> None:
        """Raises InputError if what was found in the whole source cannot be used."""
        Rows(self.source, self.split, self.columns).check(found.census)
        if not found.usable:
            raise no_usable_rows(self.source, found.bad_rows, found.first_bad)
        if self.held_out and not 0 < found.kept < found.usable:
            raise InputError(
                f"{self.source}: data.held_out: a share of {self.held_out:g} of these {found.usable} rows leaves "
                "nothing to train on or to evaluate on"
            )
        if not found.examples:
            raise nothing_left(self.cutting.max_length, found.report)

    def load(self, refuse: Callable[[BadRow], None] = lambda _: None) -> tuple[list[Example], Found]:
        """All examples in memory. Raises InputError for a source that cannot be used."""
        examples: list[Example] = []
        found = self.read(WHOLE, examples.append, refuse)
        self.check(found)
        return examples, found

    def key(self) -> str:
        """A digest of all that decides the examples: the source, the tokenizers, the options, and this package's code
        that reads rows. Raises InputError for a source that is not there."""
        cutting = self.cutting
        decides = {
            "source": Rows(self.source, self.split).fingerprint(),
            "columns": sorted(self.columns.items()),
            "form": repr(self.form),
            "tokenizer": _fingerprint(cutting.tokenizer),
            "prefix_tokenizer": cutting.prefix_tokenizer and _fingerprint(cutting.prefix_tokenizer),
            "options": [
                self.split, self.require_rejected, self.reward_range, self.labels, cutting.max_length, cutting.answers,
                self.samples, self.held_out, self.side,
            ],
            "code": _code_fingerprint(),
        }  # fmt: skip
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]

    @property
    def token_bytes(self) -> int:
        """The bytes that a token id or a length needs in a file."""
        return 2 if max(self.cutting.tokenizer.needed_embeddings, self.cutting.max_length) < 2**16 else 4


def _fingerprint(tokenizer: TextTokenizer) -> str:
    """A digest of all files of a tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}
    found = hashlib.sha256(repr(tokenizer.eos_ids).encode())
    for name, content in files.items():
        found.update(f"{name} {len(content)} ".encode() + content)
    return found.hexdigest()


def _code_fingerprint() -> str:
    """A digest of the code that makes examples, and of the libraries that it asks."""
    from importlib.metadata import version

    package = Path(__file__).parents[1]
    found = hashlib.sha256()
    for path in sorted([*(package / "data").glob("*.py"), *(package / "text").glob("*.py"), package / "json_text.py"]):
        found.update(path.read_bytes())
    found.update(repr([version(name) for name in ("transformers", "tokenizers")]).encode())
    return found.hexdigest()
