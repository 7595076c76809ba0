"""The demo task: customer-service exchanges made here, preferences between them, and an exact oracle.

    python -m pargs_jax.demo.task --show 5            # exchanges and what the oracle says of them
    python -m pargs_jax.demo.task --write DIR         # train.jsonl, eval.jsonl, test.jsonl of preferences
    python -m pargs_jax.demo.task --tokenizer DIR     # the tokenizer that comes with the package, made again

A prompt names a customer, a product and a problem. An answer is an opening, a look at the order, a remedy and a
closing, with chatter between; each part is good, plain or bad on its own, at about equal odds, so that a model of these
answers has something to choose at every sentence. `language` holds the sentences and the oracle.

Every function is deterministic: the same arguments give the same rows on every machine. The splits "train", "eval" and
"test" share no prompt.
"""

import argparse
import hashlib
import itertools
import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from pargs_jax.demo import language
from pargs_jax.demo.language import Line, Request, oracle, oracle_terms, parse_prompt
from pargs_jax.errors import InputError

__all__ = [
    "DEMO_LM",
    "Exchange",
    "exchanges",
    "oracle",
    "oracle_terms",
    "parse_prompt",
    "preferences",
    "prompts",
    "sft_rows",
    "train_tokenizer",
]

DEMO_LM = Path(str(files("pargs_jax"))) / "assets" / "demo_lm"
"""The Hugging Face folder of the language model and tokenizer that come with the package."""

SPLITS = ("train", "eval", "test")
LABEL_TEMPERATURE = 0.75

_WRONG_NAME_RATE = 0.1
_WRONG_PRODUCT_RATE = 0.15
_CHATTER_RATE = 0.3


@dataclass(frozen=True)
class Exchange:
    """A prompt and one answer to it; `id` names the prompt, and is the same wherever the prompt appears."""

    id: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class _NumberedPrompt:
    id: str
    prompt: str
    request: Request


@lru_cache(maxsize=1)
def _prompts_by_split() -> dict[str, tuple[_NumberedPrompt, ...]]:
    """All prompts that the task has, dealt to the splits (80 %, 10 %, 10 %) by a hash of their text."""
    complaints = [(problem, text) for problem, texts in language.COMPLAINTS.items() for text in texts]
    combinations = itertools.product(
        language.NAMES, language.PRODUCTS, language.GREETINGS, complaints, language.REQUESTS
    )
    by_split: dict[str, list[_NumberedPrompt]] = {split: [] for split in SPLITS}
    for number, (name, product, greeting, (problem, complaint), request) in enumerate(combinations):
        message = f"{greeting} {complaint} {request}".format(name=name, product=product)
        prompt = f"Customer: {message}\nAgent:"
        tenth = hashlib.sha256(prompt.encode()).digest()[0] % 10
        split = {0: "test", 1: "eval"}.get(tenth, "train")
        by_split[split].append(_NumberedPrompt(f"demo-{number:06d}", prompt, Request(name, product, problem)))
    return {split: tuple(numbered) for split, numbered in by_split.items()}


def _draw_prompts(n: int, split: str, rng: random.Random) -> list[_NumberedPrompt]:
    if split not in SPLITS:
        raise InputError(f"demo task: no split {split!r}; the splits are {', '.join(SPLITS)}")
    available = _prompts_by_split()[split]
    if not 0 <= n <= len(available):
        raise InputError(f"demo task: {n} prompts asked of the split {split!r}, which has {len(available)}")
    return rng.sample(available, n)


def _say(line: Line, request: Request, rng: random.Random) -> str:
    wrong_name, wrong_product = rng.random() < _WRONG_NAME_RATE, rng.random() < _WRONG_PRODUCT_RATE
    return line.template.format(
        name=rng.choice(language.NAMES) if wrong_name else request.name,
        product=rng.choice(language.PRODUCTS) if wrong_product else request.product,
    )


def _sample_answer(request: Request, rng: random.Random) -> str:
    """One answer of mixed quality, 19 to 45 words; it begins with a space, as the text after `Agent:` does."""
    fitting = language.REMEDY_LINES[request.problem]
    unfitting = tuple(line for lines in language.REMEDY_LINES.values() if lines is not fitting for line in lines)
    odds_by_part = (
        {
            language.COURTEOUS_OPENINGS: 0.35,
            language.PLAIN_OPENINGS: 0.3,
            language.RUDE_OPENINGS: 0.25,
            language.CHATTY_OPENINGS: 0.1,
        },
        {language.CHATTER: _CHATTER_RATE, (): 1 - _CHATTER_RATE},
        {language.PRODUCT_LOOKUPS: 0.5, language.PLAIN_LOOKUPS: 0.3, language.RUDE_LOOKUPS: 0.2},
        {fitting: 0.4, language.PLAIN_REMEDIES: 0.2, unfitting: 0.25, language.REFUSALS: 0.15},
        {language.CHATTER: _CHATTER_RATE, (): 1 - _CHATTER_RATE},
        {language.COURTEOUS_CLOSINGS: 0.4, language.PLAIN_CLOSINGS: 0.3, language.RUDE_CLOSINGS: 0.3},
    )
    drawn = [rng.choices(list(odds), list(odds.values()))[0] for odds in odds_by_part]
    return "".join(f" {_say(rng.choice(lines), request, rng)}" for lines in drawn if lines)


def exchanges(n: int, seed: int = 0, split: str = "train") -> list[Exchange]:
    """`n` distinct prompts of a split, each with one answer of mixed quality.

    Raises:
        InputError: no such split, or it has fewer than `n` prompts. So do all functions here that take `n`.
    """
    rng = random.Random(f"exchanges {split} {seed}")
    return [
        Exchange(drawn.id, drawn.prompt, _sample_answer(drawn.request, rng)) for drawn in _draw_prompts(n, split, rng)
    ]


def prompts(n: int, seed: int = 0, split: str = "test") -> list[dict[str, str]]:
    """`n` distinct prompts of a split: rows of `id` and `prompt`."""
    rng = random.Random(f"prompts {split} {seed}")
    return [{"id": drawn.id, "prompt": drawn.prompt} for drawn in _draw_prompts(n, split, rng)]


def sft_rows(n: int, seed: int = 0, split: str = "train") -> list[dict[str, str]]:
    """Rows of `id`, `prompt` and `chosen` for supervised training; the answers are of mixed quality."""
    return [{"id": row.id, "prompt": row.prompt, "chosen": row.answer} for row in exchanges(n, seed, split)]


def preferences(
    n: int, seed: int = 0, split: str = "train", temperature: float = LABEL_TEMPERATURE
) -> list[dict[str, str]]:
    """Rows of `id`, `prompt`, `chosen` and `rejected`: two different answers to each of `n` distinct prompts.

    The labels follow Bradley-Terry: a is chosen over b with probability sigmoid((oracle(a) - oracle(b)) / temperature).
    `temperature` must be positive; near 0 the better answer always wins, and at 0.75 about one label in ten is wrong.
    """
    if not temperature > 0:
        raise InputError(f"demo task: the label temperature is {temperature}, but must be above 0")
    rng = random.Random(f"preferences {split} {seed}")
    rows = []
    for drawn in _draw_prompts(n, split, rng):
        first = second = _sample_answer(drawn.request, rng)
        while second == first:
            second = _sample_answer(drawn.request, rng)
        margin = (oracle(drawn.prompt, first) - oracle(drawn.prompt, second)) / temperature
        # sigmoid(x) = (1 + tanh(x / 2)) / 2 does not overflow where the temperature is small.
        first_wins = rng.random() < (1 + math.tanh(margin / 2)) / 2
        chosen, rejected = (first, second) if first_wins else (second, first)
        rows.append({"id": drawn.id, "prompt": drawn.prompt, "chosen": chosen, "rejected": rejected})
    return rows


def train_tokenizer(folder: str | Path) -> None:
    """Writes `tokenizer.model` and `tokenizer_config.json`, a Llama tokenizer for this task, into `folder`.

    512 SentencePiece BPE pieces with byte fallback, trained on 20,000 exchanges; the bytes written are always the same.
    The tokenizer that comes with the package was trained when more answers named a wrong product (25 %, now 15 %), so
    it differs from a new one in a few pieces.
    No space is put before the text, so the tokens of a prompt and of its answer join to the tokens of both together.

    Raises:
        InputError: `folder` already has a `tokenizer.model`.
    """
    import sentencepiece

    folder = Path(folder)
    model_file = folder / "tokenizer.model"
    if model_file.exists():
        raise InputError(f"{model_file} exists; name a folder without a tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    # A line each for message and answer: SentencePiece trains on lines, and the line break becomes a byte piece.
    texts = (line for row in exchanges(20_000) for line in (*row.prompt.split("\n"), row.answer))
    # Extra weight for the words that answers copy from prompts: each becomes a single piece, easy to copy.
    copied = (f" {word}" for word in language.NAMES + language.PRODUCTS for _ in range(3_000))
    with model_file.open("wb") as model_writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain(texts, copied),
            model_writer=model_writer,
            model_type="bpe",
            vocab_size=512,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
        )
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": True,
        "model_max_length": 256,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def _show(n: int, seed: int) -> None:
    for row in exchanges(n, seed, "test"):
        terms = {term: round(value, 2) for term, value in oracle_terms(row.prompt, row.answer).items() if value}
        print(f"{row.prompt}{row.answer}\n  oracle {oracle(row.prompt, row.answer):+.2f}  {terms}\n")


def _write(folder: Path, n: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = {split: folder / f"{split}.jsonl" for split in SPLITS}
    for file in files.values():
        if file.exists():
            raise InputError(f"{file} exists; name a folder without it")
    for split, file in files.items():
        rows = preferences(n if split == "train" else n // 10, seed, split)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command of this module's docstring; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pargs_jax.demo.task", description="The demo task's data.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--show", type=int, metavar="N", help="print N exchanges with the oracle's terms")
    action.add_argument("--write", type=Path, metavar="DIR", help="write preferences as JSONL, one file a split")
    action.add_argument("--tokenizer", type=Path, metavar="DIR", help="train the task's tokenizer")
    parser.add_argument("--pairs", type=int, default=20_000, help="pairs to --write for training; a tenth for the rest")
    parser.add_argument("--seed", type=int, default=0, help="seed of --show and --write (default 0)")
    options = parser.parse_args(arguments)
    try:
        if options.show is not None:
            _show(options.show, options.seed)
        elif options.write is not None:
            _write(options.write, options.pairs, options.seed)
        else:
            train_tokenizer(options.tokenizer)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
