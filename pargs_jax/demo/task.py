"""The demo task: customer-service exchanges made here, preferences between them, and an exact oracle.

    python -m pargs_jax.demo.task --show 5            # exchanges and what the oracle says of them
    python -m pargs_jax.demo.task --write DIR         # train.jsonl, eval.jsonl, test.jsonl of preferences
    python -m pargs_jax.demo.task --tokenizer DIR     # the tokenizer that comes with the package, made again

A prompt names a customer, a product and a problem. An answer has five sentences with eight choices of words, each of
which is kind, plain or rude on its own. The plain word is the likeliest, so the likeliest answer is mediocre, and a
guide has something to choose at every few words. `language` holds the sentences and the oracle.

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
from pargs_jax.demo.language import Request, oracle, oracle_terms
from pargs_jax.errors import InputError

DEMO_LM = Path(str(files("pargs_jax"))) / "assets" / "demo_lm"
"""The Hugging Face folder of the language model and tokenizer that come with the package."""

SPLITS = ("train", "eval", "test")
LABEL_TEMPERATURE = 0.75

_WRONG_RATE = 0.1
_TONE_ODDS = {"kind": 0.3, "plain": 0.4, "rude": 0.3}


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


def _say(template: str, request: Request, rng: random.Random) -> str:
    """A sentence: each choice is kind, plain or rude by `_TONE_ODDS`; one name or product in ten is wrong."""
    words = {"name": request.name, "product": request.product}
    for place, all_words in (("name", language.NAMES), ("product", language.PRODUCTS)):
        if rng.random() < _WRONG_RATE:
            words[place] = rng.choice([word for word in all_words if word != words[place]])
    for name in language.choices_of(template):
        choice = language.CHOICES[name]
        by_tone = {"kind": choice.kind, "plain": (choice.plain,), "rude": choice.rude}
        tone = rng.choices(list(_TONE_ODDS), list(_TONE_ODDS.values()))[0]
        words[name] = rng.choice(by_tone[tone])
    return language.fill(template, words)


def _sample_answer(request: Request, rng: random.Random) -> str:
    """One answer of mixed quality, about 40 words; it begins with a space, as the text after `Agent:` does."""
    templates = language.PARTS | {"remedy": (language.REMEDIES[request.problem],)}
    return "".join(f" {_say(rng.choice(options), request, rng)}" for options in templates.values())


def frontier(betas: Sequence[float]) -> list[tuple[float, float]]:
    """The ceiling of every method: (KL(q || p), mean true reward) of the best policy for each beta, in nats and points.

    q(y) is proportional to p(y) exp(oracle(y) / beta), where p is the distribution that the language model learned
    from. Under p the parts of an answer are independent: it has 8 choices of words, and 4 of its sentences name the
    customer or the product. So q is a product too, and both numbers are sums over its factors.
    """
    choice = {language.WEIGHTS[tone] if tone != "plain" else 0.0: odds for tone, odds in _TONE_ODDS.items()}
    mention = {0.0: 1 - _WRONG_RATE, language.WEIGHTS["wrong"]: _WRONG_RATE}
    factors = [(choice, 8), (mention, 4)]
    points = []
    for beta in betas:
        kl = mean = 0.0
        for odds, count in factors:
            tilted = {reward: p * math.exp(reward / beta) for reward, p in odds.items()}
            total = sum(tilted.values())
            mean += count * sum(reward * q / total for reward, q in tilted.items())
            kl += count * sum(q / total * math.log(q / total / odds[reward]) for reward, q in tilted.items())
        points.append((kl, mean))
    return points


def exchanges(n: int, seed: int = 0, split: str = "train") -> list[Exchange]:
    """`n` distinct prompts of a split, each with one answer of mixed quality.

    Raises InputError if there is no such split, or it has fewer than `n` prompts. So do all functions here that take
    `n`.
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

    640 SentencePiece BPE pieces with byte fallback, trained on 20,000 exchanges; the bytes written are always the same.
    No space is put before the text, so the tokens of a prompt and of its answer join to the tokens of both together.

    Raises InputError if `folder` already has a `tokenizer.model`.
    """
    import sentencepiece

    folder = Path(folder)
    model_file = folder / "tokenizer.model"
    if model_file.exists():
        raise InputError(f"{model_file} exists; name a folder without a tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    # A line each for message and answer: SentencePiece trains on lines, and the line break becomes a byte piece.
    texts = (line for row in exchanges(20_000) for line in (*row.prompt.split("\n"), row.answer))
    # Extra weight for the words that answers copy from prompts or choose: each becomes a single piece.
    chosen = {word: None for choice in language.CHOICES.values() for word in choice.words}
    single = (f" {word}" for word in (*language.NAMES, *language.PRODUCTS, *chosen) for _ in range(10_000))
    with model_file.open("wb") as model_writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain(texts, single),
            model_writer=model_writer,
            model_type="bpe",
            vocab_size=640,
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
