"""Decoding speed: this package against PyTorch loops that do what the published codes do, on the same random weights.

    python benchmarks/decode.py                                          # GPT-2 124M guided by its like, on a CPU
    python benchmarks/decode.py --lm tiny --rm tiny --tokens 8 --repeats 1   # does it run at all? (seconds)

On a GPU that both frameworks see:

    for model in gpt2-large llama-2-7b; do
        python benchmarks/decode.py --lm $model --rm $model --dtype bfloat16 --batch 1 8 64
    done

What is compared, all with k candidates, all to the full length (no end-of-sequence token ends an answer):

- pargs_jax: one compiled call from prompts to answers, for the methods `top_k` (unguided), `args` (greedy on logits)
  and `pargs` (sampling), at each batch size. Compiling is left out, and printed.
- torch, plain sampling (batch 1): top-k sampling with a cache.
- torch, ARGS as published (batch 1, all that its code can do): both models cached, the reward cache copied k-fold.
- torch, PARGS as published (batch 1): nothing cached, candidates scored one by one. Only its first tokens are timed
  (`--pargs-tokens`), since each takes about as long as the last.

Contestants take turns, so that ratios are between neighbours in time. Before that, all run once: logits and rewards of
both frameworks must agree, and the number of tokens on which both ARGS agree is printed.

The limit is the least time in which any program could do the task of a row (cached, the prefix's keys and values read
once for all candidates): for each pass, the greater of bytes / bandwidth and operations / peak, both measured here.

Run it on a quiet machine: PyTorch's threads wait for each other at every product, and lose far more to load than XLA's.

What favours whom: the PyTorch loops are rid of the published codes' text round trips and masks (see `torch_loops`), and
PARGS is timed where its texts are shortest: both flatter the published way. PyTorch runs eagerly, as published. The
rows of a batch have prompts of one length and never end early, which flatters batches.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
from jaxtyping import Int
from models import SHAPES, causal_pass, on_device, random_params, reason_without_torch, torch_device, torch_twin

from pargs_jax.decoding.guides import CausalGuide
from pargs_jax.decoding.loop import Decoder, decode, row_keys
from pargs_jax.decoding.methods import METHODS
from pargs_jax.decoding.proposals import TopK
from pargs_jax.decoding.state import RowSettings
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.model import Params

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OURS, OURS_STACKED, TORCH = "pargs_jax", "pargs_jax, layers in a scan", "torch"
PLAIN, ARGS, PARGS = "plain sampling", "ARGS as published", "PARGS as published"
COUNTERPARTS = {"top_k": PLAIN, "args": ARGS, "pargs": PARGS}
# The root mean square of the difference over the standard deviation; unrelated weights give 1.4.
AGREEMENT = {"float32": 0.01, "bfloat16": 0.1}


@dataclass(frozen=True)
class Contestant:
    """One way to answer: `run` returns the answers' tokens, [batch new_tokens], once they are there."""

    system: str
    method: str
    batch: int
    new_tokens: int
    run: Callable[[], Int[np.ndarray, "B N"]]

    @property
    def name(self) -> str:
        return f"{self.system}: {self.method}, batch {self.batch}"

    @property
    def guided(self) -> bool:
        return self.method not in ("top_k", PLAIN)

    @property
    def tokens(self) -> int:
        """New tokens of all rows."""
        return self.batch * self.new_tokens


def main() -> None:
    args = parse_arguments()
    without_torch = "--skip-torch" if args.skip_torch else reason_without_torch()
    print(f"no torch loops: {without_torch}" if without_torch else "torch loops: yes", flush=True)
    ceilings = measure.ceilings(jnp.dtype(args.dtype))

    lm, rm = CausalModel(SHAPES[args.lm], "vocabulary"), CausalModel(SHAPES[args.rm], "reward")
    host_params = tuple(random_params(model, seed, args.dtype) for seed, model in enumerate((lm, rm)))
    prompts = np.random.default_rng(0).integers(0, lm.config.vocab_size, (max(args.batch), args.prompt), np.int32)
    contestants: list[Contestant] = []
    compile_seconds: dict[str, float] = {}
    for unrolled in {"yes": [True], "no": [False], "both": [True, False]}[args.unroll]:
        pair = [on_device(m, p, unrolled=unrolled) for m, p in zip((lm, rm), host_params, strict=True)]
        contestants += jax_contestants(pair, prompts, args, OURS if unrolled else OURS_STACKED, compile_seconds)
    agreement: dict[str, Any] = {}
    if not without_torch:
        twins = [torch_twin(model, params) for model, params in zip((lm, rm), host_params, strict=True)]
        agreement = check_agreement(pair, twins, prompts[:1], args.dtype)
        contestants += torch_contestants(*twins, prompts[:1], args)
    del host_params

    # The first calls of all, not counted.
    answers = {contestant.name: contestant.run() for contestant in contestants}
    if not without_torch:
        agreement["tokens"] = matching_tokens(contestants, answers)
    runs = {contestant.name: contestant.run for contestant in contestants}
    seconds = measure.interleaved(runs, args.repeats, warmup=0)

    rates = {c.name: seconds[c.name].rate(c.tokens) for c in contestants}
    limits = {c.name: c.tokens / least_seconds(lm, rm, c, args, ceilings) for c in contestants}
    speeds = measure.table([speed_row(c, rates[c.name], limits[c.name]) for c in contestants])
    ratios = [
        {"tokens/s of": one.name, "over those of": other.name, "ratio": rates[one.name].over(rates[other.name])}
        for one, other in pairs_to_compare(contestants)
    ]
    text = report(args, ceilings, agreement, without_torch, speeds, measure.table(ratios))
    print(text)
    payload = {
        "settings": vars(args),
        "ceilings": ceilings,
        "agreement": agreement,
        "compile_seconds": compile_seconds,
        "limits_tokens_per_second": limits,
        "tokens_per_second": rates,
        "ratios": ratios,
    }
    name = args.name or f"decode_{args.lm}_{args.rm}_{args.dtype}_{jax.default_backend()}"
    print(f"written to {measure.write_result(name, payload, text)}")


def parse_arguments() -> argparse.Namespace:
    summary, description = __doc__.split("\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lm", choices=SHAPES, default="gpt2", help="shape of the language model")
    parser.add_argument("--rm", choices=SHAPES, default="gpt2", help="shape of the reward model")
    parser.add_argument("--dtype", choices=AGREEMENT, default="float32", help="of weights, caches and products")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="batch sizes of our decoder")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each answer")
    parser.add_argument("--pargs-tokens", type=int, default=8, help="new tokens of PARGS as published")
    parser.add_argument("--k", type=int, default=10, help="candidates a step")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each contestant")
    parser.add_argument(
        "--unroll", choices=["yes", "no", "both"], default="yes", help="our layers one by one (yes) or as a scan (no)"
    )
    parser.add_argument("--skip-torch", action="store_true", help="time our decoder alone")
    parser.add_argument("--name", help="of the result files (default: from models, dtype and platform)")
    args = parser.parse_args()
    numbers = [*args.batch, args.tokens, args.pargs_tokens, args.k, args.repeats]
    if min(numbers) < 1 or args.prompt < 2:
        parser.error("batch sizes, token counts, k and repeats must be at least 1, and the prompt at least 2 tokens")
    positions = min(SHAPES[args.lm].max_positions, SHAPES[args.rm].max_positions)
    if args.prompt + max(args.tokens, args.pargs_tokens) > positions:
        parser.error(f"prompt and new tokens must fit the models' {positions} positions")
    if SHAPES[args.lm].vocab_size != SHAPES[args.rm].vocab_size:
        parser.error(f"--lm {args.lm} and --rm {args.rm} must have one vocabulary")
    return args


def check_agreement(
    pair: Sequence[tuple[CausalModel, Params]],
    twins: Sequence["PreTrainedModel"],
    prompt: Int[np.ndarray, "1 P"],
    dtype: str,
) -> dict[str, float]:
    """How far the frameworks' logits and rewards of a prompt are apart; exits if they are not one model's."""
    import torch

    (lm, lm_params), (rm, rm_params) = pair
    lm_twin, rm_twin = twins
    ours = [
        lm.logits(lm_params, jax.jit(lm.encode)(lm_params, prompt)),
        rm.rewards(rm_params, jax.jit(rm.encode)(rm_params, prompt)),
    ]
    with torch.inference_mode():
        ids = torch.from_numpy(prompt).long().to(torch_device())
        theirs = [lm_twin(ids).logits, rm_twin.score(rm_twin.base_model(ids).last_hidden_state)[..., 0]]
    distances = {
        what: float(np.sqrt(np.mean((np.asarray(mine) - other.float().cpu().numpy()) ** 2)) / np.std(mine))
        for what, mine, other in zip(("logits", "rewards"), ours, theirs, strict=True)
    }
    if max(distances.values()) > AGREEMENT[dtype]:
        raise SystemExit(f"the frameworks do not hold the same weights: they differ by {distances}")
    return distances


def torch_contestants(
    lm: "PreTrainedModel", rm: "PreTrainedModel", prompt: Int[np.ndarray, "1 P"], args: argparse.Namespace
) -> list[Contestant]:
    import torch
    import torch_loops

    device = torch_device()
    ids = torch.from_numpy(prompt).long().to(device)
    generator = torch.Generator(device).manual_seed(0)

    def until_done(tokens: torch.Tensor) -> Int[np.ndarray, "1 N"]:
        return tokens.cpu().numpy()  # the copy waits for the device

    def plain() -> Int[np.ndarray, "1 N"]:
        return until_done(torch_loops.plain_sampling(lm, ids, args.tokens, args.k, generator))

    def published_args() -> Int[np.ndarray, "1 N"]:
        weight = METHODS["args"].weight
        return until_done(torch_loops.args_loop(lm, rm, ids, args.tokens, args.k, weight).tokens)

    def published_pargs() -> Int[np.ndarray, "1 N"]:
        weight = METHODS["pargs"].weight
        answer = torch_loops.pargs_loop(lm, rm, ids, args.pargs_tokens, args.k, weight, generator)
        return until_done(answer.tokens)

    return [
        Contestant(TORCH, PLAIN, 1, args.tokens, plain),
        Contestant(TORCH, ARGS, 1, args.tokens, published_args),
        Contestant(TORCH, PARGS, 1, args.pargs_tokens, published_pargs),
    ]


def jax_contestants(
    pair: Sequence[tuple[CausalModel, Params]],
    prompts: Int[np.ndarray, "B P"],
    args: argparse.Namespace,
    system: str,
    compile_seconds: dict[str, float],
) -> Iterator[Contestant]:
    """Our decoder, compiled, for each method and batch size; notes in `compile_seconds` how long compiling took."""
    (lm, lm_params), (rm, rm_params) = pair
    for batch in args.batch:
        ids, lengths = jnp.asarray(prompts[:batch]), jnp.full(batch, args.prompt, jnp.int32)
        keys = row_keys(0, jnp.arange(batch))
        for name in COUNTERPARTS:
            method = METHODS[name]
            guides, guide_params = ((CausalGuide(rm),), (rm_params,)) if method.guided else ((), ())
            decoder = Decoder(lm, guides, TopK(args.k), method.rule)
            settings = RowSettings.alike(
                batch,
                weights=[method.weight] * len(guides),
                temperature=method.temperature,
                candidates=args.k,
                max_new_tokens=args.tokens,
            )
            inputs = (lm_params, guide_params, ids, lengths, keys, settings)
            began = time.perf_counter()
            compiled = decode.lower(decoder, *inputs, args.tokens).compile()

            def run(compiled: Any = compiled, inputs: tuple = inputs) -> Int[np.ndarray, "B N"]:
                return np.asarray(jax.block_until_ready(compiled(*inputs)).tokens)

            contestant = Contestant(system, name, batch, args.tokens, run)
            compile_seconds[contestant.name] = time.perf_counter() - began
            print(f"compiled in {compile_seconds[contestant.name]:.0f} s: {contestant.name}", flush=True)
            yield contestant


def matching_tokens(contestants: Sequence[Contestant], answers: dict[str, Int[np.ndarray, "B N"]]) -> dict[str, int]:
    """On how many tokens from the start each of our greedy ARGS agrees with the published one, on the first prompt."""
    published = next(answers[c.name][0] for c in contestants if c.method == ARGS)
    ours = {c.name: answers[c.name][0] == published for c in contestants if c.method == "args"}
    return {name: int(np.cumprod(same).sum()) for name, same in ours.items()}


def least_seconds(
    lm: CausalModel, rm: CausalModel, contestant: Contestant, args: argparse.Namespace, ceilings: measure.Ceilings
) -> float:
    """The limit: the passes that one run of a contestant needs, one after another, since each waits for the last."""
    itemsize = jnp.dtype(args.dtype).itemsize
    rows, width = contestant.batch, args.prompt
    passes = [causal_pass(lm, itemsize, queries=rows * (width - 1), seen=width / 2)]
    if contestant.guided:
        passes.append(causal_pass(rm, itemsize, queries=rows * width, seen=(width + 1) / 2))
    for text in range(width, width + contestant.new_tokens):
        passes.append(causal_pass(lm, itemsize, queries=rows, seen=text, cached=rows * (text - 1), logits=rows))
        if contestant.guided:
            passes.append(causal_pass(rm, itemsize, queries=rows * args.k, seen=text + 1, cached=rows * text))
    return sum(ceilings.least_seconds(*work) for work in passes)


def speed_row(contestant: Contestant, rate: measure.Spread, limit: float) -> dict[str, Any]:
    return {
        "system": contestant.system,
        "method": contestant.method,
        "batch": contestant.batch,
        "tokens a row": contestant.new_tokens,
        "tokens/s": rate,
        "limit, tokens/s": limit,
        "share of the limit": rate.median / limit,
    }


def pairs_to_compare(contestants: Sequence[Contestant]) -> Iterator[tuple[Contestant, Contestant]]:
    """Ours against its published counterpart; guided against unguided, for ours and for ARGS as published."""
    by_name = {(c.system, c.method, c.batch): c for c in contestants}
    for contestant in contestants:
        published = by_name.get((TORCH, COUNTERPARTS.get(contestant.method), 1))
        if published:
            yield contestant, published
    for contestant in contestants:
        unguided = {"pargs": "top_k", ARGS: PLAIN}.get(contestant.method)
        if unguided:
            yield contestant, by_name[contestant.system, unguided, contestant.batch]


def report(
    args: argparse.Namespace,
    ceilings: measure.Ceilings,
    agreement: dict[str, Any],
    without_torch: str | None,
    speeds: str,
    ratios: str,
) -> str:
    """The result in markdown."""
    checks = f"The PyTorch loops were left out: {without_torch}."
    if not without_torch:
        counts = "\n".join(f"- {name}: {count} of {args.tokens}" for name, count in agreement["tokens"].items())
        checks = f"""\
Both frameworks hold the same weights: on one prompt their logits differ by {agreement["logits"]:.1g} standard
deviations (root mean square), their rewards by {agreement["rewards"]:.1g}. Tokens from the start on which greedy
answers equal those of ARGS as published:

{counts}"""
    return f"""\
# Decoding: {args.lm} guided by {args.rm}, {args.dtype}, prompt {args.prompt}, k {args.k}

{speeds}

Tokens of all rows a second, prompts read included, compiling left out: median of {args.repeats} runs (lowest to
highest). Every row runs to its full length. The published codes do one prompt at a time, so their tokens/s at batch 1
are what they give at any number of prompts.

{ratios}

Ratios are taken round by round, between runs that were neighbours in time.

Limit: the least time for the passes of a task, each the greater of bytes / {ceilings.bandwidth / 1e9:.1f} GB/s and
operations / {ceilings.matmul / 1e9:.0f} GFLOP/s, the rates measured on this device for reading and for large products
in {args.dtype}. Models small enough for the processor's cache can exceed it.

{checks}
"""


if __name__ == "__main__":
    main()
