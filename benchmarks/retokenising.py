r"""The host's part of a step of a guide with its own tokenizer, by the script and the length of the answer.

    python benchmarks/retokenising.py --lm-tokenizer GPT2_FOLDER --rm-tokenizer DEBERTA_FOLDER     # two minutes
    python benchmarks/retokenising.py --lengths 4 8 --rows 2 --repeats 1                           # does it run at all?

An encoder guide calls the host once a step: it splits the text of every row with every candidate into the reward
model's tokens. Here that call is made as the guide makes it, for answers of each length, each one token longer than in
the call before, and its CPU time is taken. Beside it, the same answers by a retokeniser that settles nothing, and so
splits the whole answer again at every step.
"""

import argparse
import time
from typing import Any

import measure
import numpy as np

from pargs_jax.demo.task import DEMO_LM
from pargs_jax.text.retokenisation import Candidates, Retokeniser
from pargs_jax.text.tokenization import TextTokenizer

TEXTS = {
    "English": " The little girl went to the park with her mother, and saw a big red ball. It wasn't hers; it cost 9!",
    "Russian": " Мы долго гуляли по городу, а потом зашли в кафе. Он сказал: «Привет, мир!» — и заказал чай с лимоном.",
    "Arabic": " ذهبنا اليوم إلى الحديقة، وكان الجو جميلاً. كيف حالك؟ مرحبا بالعالم، هذا كتاب جديد عن تاريخ المدينة.",
    "Hindi": " आज मौसम अच्छा है और हम बाहर खेल रहे हैं। यह किताब हिन्दी में लिखी गई है, और बहुत लोकप्रिय है।",
    "Chinese": "我们今天去公园玩，天气很好。他说：“你想看什么书？”这本书的作者住在北京，已经写了十年小说！",
    "Japanese": "それは、本当です」と言った。東京タワーへ行きましょう。人々がたくさんいますね、とても楽しいです。",
    "emoji": "🙂🙃🎉🎉👍🏽👍🏽👍🔥🔥✨😂🙈🌍🌧️☀️🍎🍕🎂💻📚",
}


def main() -> None:
    args = parse_arguments()
    lm, rm = TextTokenizer.load(args.lm_tokenizer), TextTokenizer.load(args.rm_tokenizer)
    settling, whole = Retokeniser(lm, rm), Retokeniser(lm, rm)
    whole._boundaries = None
    rows = []
    for script, text in TEXTS.items():
        tokens = np.array(lm.encode_answer(text * (1 + max(args.lengths) // 8))[: max(args.lengths) + args.steps])
        if len(tokens) < max(args.lengths) + args.steps:
            raise SystemExit(f"{script}: only {len(tokens)} tokens")
        for length in args.lengths:
            spreads = {name: [] for name in ("settled", "whole")}
            for _ in range(args.repeats):
                for name, retokeniser in (("settled", settling), ("whole", whole)):
                    spreads[name].append(milliseconds(retokeniser, tokens, length, args))
            mine, theirs = (measure.Spread.of(runs) for runs in spreads.values())
            rows.append(
                {
                    "script": script,
                    "answer": length,
                    "ms a step": mine,
                    "settles nothing, ms": theirs,
                    "times as long": theirs.over(mine),
                }
            )
    text = f"""\
# The host's part of an encoder guide's step: {args.rows} rows, {args.k} candidates

{measure.table(rows)}

CPU time of this process in one call, the mean of {args.steps} steps; median of {args.repeats} runs (lowest to highest),
by turns. Answers are as many tokens of the language model long; at most {args.width} tokens of the reward model.
"""
    print(text)
    name = args.name or "retokenising"
    print(f"written to {measure.write_result(name, {'settings': vars(args), 'rows': rows}, text)}")


def parse_arguments() -> argparse.Namespace:
    summary, description = __doc__.split("\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lm-tokenizer", default=str(DEMO_LM), help="folder of the language model's tokenizer")
    parser.add_argument("--rm-tokenizer", default=str(DEMO_LM), help="folder of the reward model's tokenizer")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256, 512], help="tokens of the answers")
    parser.add_argument("--rows", type=int, default=16, help="answers a step")
    parser.add_argument("--k", type=int, default=10, help="candidates of each answer")
    parser.add_argument("--width", type=int, default=1024, help="the most tokens of an answer for the reward model")
    parser.add_argument("--steps", type=int, default=16, help="steps of each run")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each contestant")
    parser.add_argument("--name", help="of the result files")
    return parser.parse_args()


def milliseconds(retokeniser: Retokeniser, tokens: np.ndarray, length: int, args: argparse.Namespace) -> float:
    """CPU milliseconds of a step, for answers of `length` tokens that grow by one at each step."""
    call(retokeniser, tokens, length - 1, args)
    began = time.process_time()
    for step in range(args.steps):
        call(retokeniser, tokens, length + step, args)
    return 1e3 * (time.process_time() - began) / args.steps


def call(retokeniser: Retokeniser, tokens: np.ndarray, length: int, args: argparse.Namespace) -> Candidates:
    """One step's call: all rows have this answer, each after a prompt of its own."""
    rows = np.concatenate(
        [np.arange(100, 100 + args.rows)[:, None], np.broadcast_to(tokens[:length], (args.rows, length))], axis=1
    )
    drawn = np.random.default_rng(length).choice(tokens, (args.rows, args.k))
    drawn[:, 0] = tokens[length]
    count = np.ones(args.rows, np.int32)
    none: Any = np.zeros(args.rows, np.int32)
    return retokeniser.candidates(
        rows.astype(np.int32), count, count + length, drawn.astype(np.int32), none, args.width, args.width
    )


if __name__ == "__main__":
    main()
