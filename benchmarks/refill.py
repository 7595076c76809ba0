"""Answers a minute with rows that refill, against one compiled call for each batch, on HH's prompts.

    python benchmarks/refill.py --pairs hh_helpful.test.jsonl.gz --tokenizer openai-community/gpt2
    python benchmarks/refill.py ... --prompts 24 --tokens 16 --repeats 1      # does it run at all?

Both answer the same prompts, shortest first, with the same models and keys, and both read the answers back as texts.
The models are GPT-2s with random weights, one of them a causal reward model. They never end an answer themselves:
instead, each prompt's longest answer is as long as its chosen answer in HH, at most `--tokens`.

- a call a batch: prefill and all steps in one compiled call, which takes as long as its longest answer.
- rows that refill: `Scheduler`, which `decode.py` uses.

They take turns, after one run of each that is not counted; compiling is left out. The answers must be equal.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import measure
import numpy as np
from models import on_device, random_params

from pargs_jax.data.preferences import Prompt, load_preferences
from pargs_jax.decoding.methods import METHODS
from pargs_jax.generation.answers import Answer, AnswerReader
from pargs_jax.generation.plan import Batch, Numbers, Request, Settings
from pargs_jax.generation.program import DecodingProgram, Models, Programs, guide_prompts, make_guides, run_batch
from pargs_jax.generation.reward_models import RewardModel
from pargs_jax.generation.scheduler import Scheduler
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.gpt2 import GPT2Config
from pargs_jax.text.prompts import get_form
from pargs_jax.text.tokenization import TextTokenizer

BATCHES, REFILLED = "a call a batch", "rows that refill"

keys_of = jax.jit(Numbers.keys)


def main() -> None:
    args = parse_arguments()
    tokenizer = TextTokenizer.load(args.tokenizer)
    models, reader = make_models(args, tokenizer)
    runs: dict[str, Callable[[], None]] = {}
    answers: dict[str, list[Answer]] = {}
    processor: dict[str, list[float]] = {}
    shares = {}
    for method in args.methods:
        settings = Settings(METHODS[method], max_new_tokens=args.tokens)
        requests = make_requests(args, tokenizer, settings)
        shares[method] = useful_share(requests, args.batch)
        for name, answer in ((BATCHES, answer_batches), (REFILLED, answer_refilled)):
            label, programs = f"{name}: {method}", Programs()

            def run(
                label: str = label,
                answer: Callable[..., Iterator[list[Answer]]] = answer,
                given: tuple = (models, programs, reader, requests, settings, args.batch),
            ) -> None:
                began = time.process_time()
                answers[label] = [each for found in answer(*given) for each in found]
                processor.setdefault(label, []).append(time.process_time() - began)

            runs[label] = run
    seconds = measure.interleaved(runs, args.repeats)
    for method in args.methods:
        check_equal(*(answers[f"{name}: {method}"] for name in (BATCHES, REFILLED)))
    rows, ratios = [], []
    for label, spread in seconds.items():
        rows.append(
            {
                "what": label,
                "answers/min": spread.rate(60 * len(answers[label])),
                "tokens/s": spread.rate(sum(each.tokens for each in answers[label])),
                "CPU seconds": measure.Spread.of(processor[label][1:]),
            }
        )
    for method in args.methods:
        slow, fast = (f"{name}: {method}" for name in (BATCHES, REFILLED))
        cpu = [measure.Spread.of(processor[label][1:]) for label in (slow, fast)]
        ratios.append(
            {
                "method": method,
                "answers/min, over those of a call a batch": seconds[slow].over(seconds[fast]),
                "its CPU seconds over these": cpu[0].over(cpu[1]),
                "useful row-steps of a call a batch": f"{shares[method]:.0%}",
            }
        )
    text = report(args, answers, measure.table(rows), measure.table(ratios))
    print(text)
    payload = {"settings": vars(args), "seconds": seconds, "cpu_seconds": processor, "rows": rows, "ratios": ratios}
    print(f"written to {measure.write_result(args.name, payload, text)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True, help="HH's pairs: a file of prompt, chosen, rejected")
    parser.add_argument("--tokenizer", required=True, help="a folder or hub id")
    parser.add_argument("--methods", nargs="+", default=["pargs"])
    parser.add_argument("--prompts", type=int, default=160)
    parser.add_argument("--longest-prompt", type=int, default=256, help="longer ones are left out")
    parser.add_argument("--tokens", type=int, default=128, help="longest answer")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights and products")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of prompts")
    parser.add_argument("--name", default=f"refill_{jax.default_backend()}", help="of the result files")
    return parser.parse_args()


def make_models(args: argparse.Namespace, tokenizer: TextTokenizer) -> tuple[Models, AnswerReader]:
    shape = GPT2Config(
        vocab_size=tokenizer.vocab_size, width=args.width, layers=args.layers, heads=args.width // 64,
        feedforward=4 * args.width,
    )  # fmt: skip
    pair = (CausalModel(shape, "vocabulary"), CausalModel(shape, "reward"))
    lm, rm = (on_device(m, random_params(m, seed, args.dtype), unrolled=True) for seed, m in enumerate(pair))
    reward_model = RewardModel("random", *rm, tokenizer, None, lm_vocab_size=tokenizer.vocab_size)
    return Models(*lm, (), tokenizer.eos_id, [reward_model]), AnswerReader("random", tokenizer, [reward_model])


def make_requests(args: argparse.Namespace, tokenizer: TextTokenizer, settings: Settings) -> list[Request]:
    """Pairs of HH as requests, shortest prompts first: each asks for as many tokens as its chosen answer has."""
    found = []
    for number, pair in enumerate(load_preferences(args.pairs, get_form("hh"), tokenizer=tokenizer).rows):
        ids = tokenizer.encode_prompt(pair.prompt)
        if len(ids) <= args.longest_prompt:
            length = min(args.tokens, len(tokenizer.encode_answer(pair.chosen)) + 1)
            own = dataclasses.replace(settings, max_new_tokens=length)
            found.append(Request(Prompt(str(number), pair.prompt), 0, own, ids, [ids]))
    chosen = np.random.default_rng(args.seed).choice(len(found), args.prompts, replace=False)
    return sorted((found[i] for i in chosen), key=lambda request: len(request.lm_ids))


def useful_share(requests: Sequence[Request], batch: int) -> float:
    """The share of a batch's row-steps that draw a token."""
    lengths = [request.settings.max_new_tokens for request in requests]
    steps = sum(max(lengths[first : first + batch]) for first in range(0, len(lengths), batch))
    return sum(lengths) / (batch * steps)


def answer_batches(
    models: Models,
    programs: Programs,
    reader: AnswerReader,
    requests: Sequence[Request],
    settings: Settings,
    rows: int,
) -> Iterator[list[Answer]]:
    guides, guide_params = make_guides(models, settings, [0])
    program = DecodingProgram.of(models, guides, settings)
    for first in range(0, len(requests), rows):
        batch = Batch.of(requests[first : first + rows], rows, models.reward_models)
        prompts = guide_prompts(settings.method, models.reward_models, batch)
        arguments = (*batch.lm_prompts, keys_of(batch.numbers), batch.settings(1), prompts)
        (decoded, _), seconds = programs(run_batch, (program,), (models.lm_params, guide_params), *arguments)
        yield reader.read(batch, jax.device_get(decoded), [seconds / rows] * rows, settings)


def answer_refilled(
    models: Models,
    programs: Programs,
    reader: AnswerReader,
    requests: Sequence[Request],
    settings: Settings,
    rows: int,
) -> Iterator[list[Answer]]:
    scheduler = Scheduler(models, programs, settings, rows)
    scheduler.add(requests)
    while not scheduler.is_idle:
        for ended in scheduler.step():
            yield reader.read(*ended, settings)


def check_equal(one: Sequence[Answer], other: Sequence[Answer]) -> None:
    """Raises SystemExit unless both answered every prompt with the same text."""
    texts = [{answer.id: answer.response for answer in answers} for answers in (one, other)]
    if texts[0] != texts[1]:
        differ = sum(texts[1].get(key) != text for key, text in texts[0].items())
        raise SystemExit(f"{differ} of {len(texts[0])} answers differ")


def report(args: argparse.Namespace, answers: dict[str, list[Answer]], speeds: str, ratios: str) -> str:
    lengths = [answer.tokens for answer in next(iter(answers.values()))]
    return f"""# Rows that refill

{args.prompts} prompts of HH of at most {args.longest_prompt} tokens, drawn with seed {args.seed}, {args.batch} rows. A
prompt's longest answer has as many tokens as its chosen answer in HH, at most {args.tokens} (mean
{np.mean(lengths):.0f}). Language model and causal reward model: random GPT-2s of width {args.width} with {args.layers}
layers, {args.dtype}. Median of {args.repeats} runs in turns (lowest to highest). All answers are equal.

{speeds}

{ratios}

Reading the answers back is part of both. Compiling is part of neither. Made by `python benchmarks/refill.py`."""


if __name__ == "__main__":
    main()
