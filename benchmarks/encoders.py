r"""Encoders as reward models: DeBERTa-v3 with full and with prefix-causal attention, in decoding and in training.

    python benchmarks/encoders.py --lm-tokenizer GPT2_FOLDER --rm-tokenizer DEBERTA_FOLDER   # ten minutes on a CPU
    python benchmarks/encoders.py --shape tiny --lm tiny --repeats 1 --texts 32              # does it run at all?

On a GPU, the paper's pairs at full size:

    for lm in gpt2-large llama-2-7b; do
        python benchmarks/encoders.py --lm $lm --shape large --dtype bfloat16 --texts 512 --skip-torch ...
    done

Decoding, at batch 1, greedy PARGS, random weights; the time of a step at each length of text, in the language model's
tokens:

- encoder: the exact guide, all k texts in one batch.
- prefix_causal: the same weights with prefix-causal attention and a cache.
- language model alone: what guidance is paid on top of.
- torch, one by one: the published loop. Every candidate's text is decoded, split again and read, one by one.
- host: what of a step of ours is the host callback, which splits texts into the reward model's tokens.

Training, on every prefix of both answers of each pair, the gradient alone:

- chunked: `EncoderModel.read_answers`, as `partial_bt` uses it: texts grouped by length, one chunk's memory.
- plain batch: all prefixes as rows of one padded batch.
- prefix_causal: one pass.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
from models import SHAPES, on_device, random_params, reason_without_torch, torch_device, torch_twin

from pargs_jax.data.batches import Batch
from pargs_jax.decoding.loop import Decoder, row_keys
from pargs_jax.decoding.proposals import TopK
from pargs_jax.decoding.rules import Greedy
from pargs_jax.decoding.state import RowSettings
from pargs_jax.demo.task import DEMO_LM, preferences
from pargs_jax.evaluation.cost import layer_weights, step_operations
from pargs_jax.generation.reward_models import RewardModel, left_pad
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.deberta import DebertaConfig
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.model import Model, Params
from pargs_jax.models.prefix_causal import PrefixCausalModel
from pargs_jax.objectives.bradley_terry import choose_prefixes, prefix_loss
from pargs_jax.text.retokenisation import Retokeniser
from pargs_jax.text.tokenization import TextTokenizer

ENCODERS = {
    "tiny": DebertaConfig(vocab_size=128100, width=64, layers=2, heads=4, feedforward=128),
    "small": DebertaConfig(vocab_size=128100, width=768, layers=6, heads=12, feedforward=3072),
    "large": DebertaConfig(vocab_size=128100, width=1024, layers=24, heads=16, feedforward=4096),
}
WEIGHT = 1.0
CHUNK = 8


class TimedRetokeniser(Retokeniser):
    """Adds up the time of its callbacks."""

    seconds = 0.0

    def candidates(self, *args: Any) -> Any:
        began = time.perf_counter()
        result = super().candidates(*args)
        self.seconds += time.perf_counter() - began
        return result


def main() -> None:
    args = parse_arguments()
    without_torch = "--skip-torch" if args.skip_torch else reason_without_torch()
    ceilings = measure.ceilings(jnp.dtype(args.dtype))
    config = ENCODERS[args.shape]
    decoding = decode_rows(args, config, ceilings, without_torch)
    training = [] if args.only_decoding else train_rows(args, config)
    text = f"""\
# Encoders: a DeBERTa-v3 of {args.shape} shape guides {args.lm}, {args.dtype}, k {args.k}, batch 1

{measure.table(decoding)}

Milliseconds of a decoding step: median of {args.repeats} runs of {args.tokens} steps (lowest to highest), prompts read
before. Limit: for each model the greater of weights' bytes / {ceilings.bandwidth / 1e9:.1f} GB/s and operations / \
{ceilings.matmul / 1e9:.0f} GFLOP/s (`step_operations`). {
        f"The PyTorch loop was left out: {without_torch}."
        if without_torch
        else "The encoder's tokens equal those of the PyTorch loop."
    }
"""
    if training:
        text += f"""\

# Training on all prefixes: {args.pairs} pairs, prompts of {args.train_prompt} tokens, answers of {args.answer}

{measure.table(training)}

Loss and gradient, median of {args.repeats} runs (lowest to highest); chunks of {CHUNK} prefixes.
"""
    print(text)
    name = args.name or f"encoders_{args.lm}_{args.shape}_{args.dtype}_{jax.default_backend()}"
    payload = {"settings": vars(args), "ceilings": ceilings, "decoding": decoding, "training": training}
    print(f"written to {measure.write_result(name, payload, text)}")


def parse_arguments() -> argparse.Namespace:
    summary, description = __doc__.split("\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lm", choices=SHAPES, default="gpt2", help="shape of the language model")
    parser.add_argument("--shape", choices=ENCODERS, default="small", help="shape of the DeBERTa-v3")
    parser.add_argument("--lm-tokenizer", default=str(DEMO_LM), help="folder of the language model's tokenizer")
    parser.add_argument("--rm-tokenizer", default=str(DEMO_LM), help="folder of the reward model's tokenizer")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights and products")
    parser.add_argument("--texts", type=int, nargs="+", default=[64, 128, 192], help="tokens of the prompts")
    parser.add_argument("--tokens", type=int, default=4, help="steps timed at each length")
    parser.add_argument("--k", type=int, default=10, help="candidates a step")
    parser.add_argument("--pairs", type=int, default=2, help="pairs in training")
    parser.add_argument("--train-prompt", type=int, default=32, help="tokens of the prompts in training")
    parser.add_argument("--answer", type=int, default=32, help="tokens of the answers in training")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each contestant")
    parser.add_argument("--only-decoding", action="store_true", help="leave out training")
    parser.add_argument("--skip-torch", action="store_true", help="time our code alone")
    parser.add_argument("--name", help="of the result files")
    return parser.parse_args()


def decode_rows(
    args: argparse.Namespace, config: DebertaConfig, ceilings: measure.Ceilings, without_torch: str | None
) -> list[dict[str, Any]]:
    lm_tokenizer, rm_tokenizer = TextTokenizer.load(args.lm_tokenizer), TextTokenizer.load(args.rm_tokenizer)
    lm = CausalModel(SHAPES[args.lm], "vocabulary")
    models: dict[str, Model] = {
        "encoder": EncoderModel(config, "reward"),
        "prefix_causal": PrefixCausalModel(config, "reward"),
    }
    lm_host, rm_host = random_params(lm, 0, args.dtype), random_params(models["encoder"], 1, args.dtype)
    retokeniser = TimedRetokeniser(lm_tokenizer, rm_tokenizer)
    lm_static, lm_params = on_device(lm, lm_host, unrolled=True)
    story = " ".join(row["prompt"] + row["chosen"] for row in preferences(100, seed=0))
    ids = lm_tokenizer.encode_prompt(story)

    rows = []
    for width in args.texts:
        prompts = left_pad([ids[:width]], 1, width)
        own_ids = rm_tokenizer.encode_prompt(lm_tokenizer.decode(ids[:width]))
        contestants: dict[str, Callable[[], Any]] = {}
        inputs = (*prompts, row_keys(0, jnp.arange(1)))
        for name, model in {"language model alone": None, **models}.items():
            guides, guide_params, guide_prompts = (), (), ()
            if model is not None:
                static, params = on_device(model, rm_host, unrolled=True)
                reward_model = RewardModel(name, static, params, rm_tokenizer, retokeniser)
                own_prompts = reward_model.pad_prompts([own_ids], 1)
                guides, guide_params = (reward_model.guide(args.tokens),), (params,)
                guide_prompts = (own_prompts,)
            decoder = Decoder(lm_static, guides, TopK(args.k), Greedy())
            contestants[name] = stepper(decoder, (lm_params, guide_params), inputs, args.tokens, guide_prompts)
        if not without_torch:
            import torch
            import torch_loops
            from transformers import AutoTokenizer

            twins = [torch_twin(lm, lm_host), torch_twin(models["encoder"], rm_host)]
            contestants["torch, one by one"] = partial(
                torch_loops.text_guided_loop, *twins,
                *(AutoTokenizer.from_pretrained(folder) for folder in (args.lm_tokenizer, args.rm_tokenizer)),
                torch.from_numpy(prompts.tokens).long().to(torch_device()), args.tokens, args.k, WEIGHT,
            )  # fmt: skip
        answers = {name: np.asarray(run())[0].tolist() for name, run in contestants.items()}
        if not without_torch and answers["encoder"] != answers["torch, one by one"]:
            raise SystemExit(f"the encoder's answer is not torch's: {answers}")
        seconds = measure.interleaved(contestants, args.repeats, warmup=0)
        retokeniser.seconds = 0.0
        contestants["prefix_causal"]()
        host = retokeniser.seconds / args.tokens
        operations = step_operations(lm, models["encoder"], text=width + args.tokens // 2, k=args.k)
        itemsize = jnp.dtype(args.dtype).itemsize
        lm_bytes = itemsize * (layer_weights(lm) + lm.config.vocab_size * lm.config.head_width)
        alone = lm_bytes / ceilings.bandwidth
        cached = step_operations(lm, models["prefix_causal"], text=width + args.tokens // 2, k=args.k)
        limits = {
            "language model alone": alone,
            "encoder": alone + ceilings.least_seconds(itemsize * layer_weights(models["encoder"]), operations.guide),
            "prefix_causal": alone
            + ceilings.least_seconds(itemsize * layer_weights(models["prefix_causal"]), cached.guide),
        }
        for name, spread in seconds.items():
            milliseconds = measure.Spread.of(1e3 * run / args.tokens for run in spread.runs)
            rows.append(
                {
                    "text": width,
                    "guide": name,
                    "ms a step": milliseconds,
                    "limit, ms": 1e3 * limits[name] if name in limits else "",
                    "torch's time over this": seconds["torch, one by one"].over(spread) if not without_torch else "",
                    "encoder's time over this": seconds["encoder"].over(spread),
                    "host, share of the step": 1e3 * host / milliseconds.median if name in models else "",
                }
            )
    return rows


def stepper(decoder: Decoder, params: Any, inputs: Any, tokens: int, guide_prompts: tuple) -> Callable[[], Any]:
    """Decodes a batch whose prompts were read before."""
    prompts, lengths, keys = inputs
    settings = RowSettings.alike(
        len(prompts),
        weights=[WEIGHT] * len(decoder.guides),
        candidates=decoder.candidates,
        max_new_tokens=tokens,
    )
    start = jax.jit(Decoder.start, static_argnums=(0, 6))
    advance = jax.jit(Decoder.advance, static_argnums=(0, 3))
    state = jax.block_until_ready(start(decoder, params, prompts, lengths, keys, settings, tokens, guide_prompts))

    def run() -> np.ndarray:
        return np.asarray(decoder.read(advance(decoder, params, state, tokens)).tokens)

    return run


def train_rows(args: argparse.Namespace, config: DebertaConfig) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    encoder, causal = EncoderModel(config, "reward"), PrefixCausalModel(config, "reward")
    params = jax.device_put(random_params(encoder, 1, args.dtype))
    batch = Batch(
        rng.integers(3, 1000, (args.pairs, args.train_prompt), np.int32),
        np.full(args.pairs, args.train_prompt, np.int32),
        rng.integers(3, 1000, (args.pairs, 2, args.answer), np.int32),
        np.full((args.pairs, 2), args.answer, np.int32),
        np.ones(args.pairs, np.float32),
    )

    def loss(params: Params, *, kind: str) -> jax.Array:
        prefixes = choose_prefixes(batch.answer_lengths, args.answer)
        model = causal if kind == "prefix_causal" else encoder
        outputs = model.read_answers(params, batch, closing_id=2, chunk=CHUNK if kind == "chunked" else args.answer)
        pairs = outputs.rewards_at(prefixes.lengths, descending=kind == "chunked")
        return prefix_loss(pairs, prefixes, batch.weights)

    kinds = ("chunked", "plain batch", "prefix_causal")
    compiled = {kind: jax.jit(jax.value_and_grad(partial(loss, kind=kind))).lower(params).compile() for kind in kinds}
    memories = {kind: step.memory_analysis().temp_size_in_bytes for kind, step in compiled.items()}
    runs = {kind: partial(lambda step: jax.block_until_ready(step(params)), step) for kind, step in compiled.items()}
    seconds = measure.interleaved(runs, args.repeats)
    return [
        {
            "all prefixes by": kind,
            "ms": measure.Spread.of(1e3 * run for run in spread.runs),
            "memory for activations, MB": memories[kind] / 1e6,
            "plain batch's time over this": seconds["plain batch"].over(spread),
        }
        for kind, spread in seconds.items()
    ]


if __name__ == "__main__":
    main()
