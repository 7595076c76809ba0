"""What every method costs: tokens that both models read, and milliseconds, for each token of an answer (section 5.3 of
PARGS, measured).

    python -m studies.cost.run                       # GPT-2 124M shapes, on 2 CPU cores: 20 minutes
    python -m studies.cost.run --report              # from the results that are there
    python -m studies.cost.run --lm tiny --rm tiny --tokenizer demo --tokens 8 --rounds 1 --results runs/try \
        --out runs/try                               # does all of it run?
    python -m studies.cost.run --lm meta-llama/Llama-3.2-1B --rm RM --arm ARM --dtype bfloat16 --mesh gpu-1 \
        --results runs/cost_llama                    # the same with real models

A shape (tiny, small, gpt2, gpt2-large, llama-2-7b) gives random weights, also for the reward models of the other
kinds; of real models, methods without a reward model of their kind are left out. Run it on a quiet machine.

Methods take turns. Unguided decoding (top_k) is timed again beside them at least every 20 seconds, and each run is
divided by the last one before it. A method is timed until it has taken --enough seconds or --rounds runs; the first run
of a short one is not counted. It is left out if even the least possible time of a run exceeds --longest seconds. A
second run of this script goes on where the first stopped.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Ceilings, Spread, ceilings, machine
from benchmarks.models import SHAPES, random_params
from pargs_jax.commands.process import run_as_command
from pargs_jax.config import DecodeConfig
from pargs_jax.data.preferences import Prompt
from pargs_jax.data_config import DEMO
from pargs_jax.decoding.methods import METHODS, Method
from pargs_jax.demo.task import DEMO_LM, preferences
from pargs_jax.durable_files import write_whole
from pargs_jax.errors import InputError
from pargs_jax.generation.answers import Answer
from pargs_jax.generation.session import SCALE_ANSWERS, Session, Settings
from pargs_jax.mesh import start
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.hf import describe_model, save_model
from pargs_jax.models.preference_lora import PreferenceLora
from pargs_jax.text.tokenization import TextTokenizer
from studies.cost.passes import Pass, Role, least_seconds, operations, passes, queries, roles_of
from studies.page import fill_page, table

PAGE, FIGURE = Path("docs/study_cost.md"), Path("docs/study_cost.png")
UNGUIDED = "top_k"
SIDE_BY_SIDE = 20.0
"""Seconds after which unguided decoding is timed again."""
SHORT = 3.0
"""Seconds of a run up to which the first one, which warms up, is not counted."""

Row = dict[str, Any]


class Entry(NamedTuple):
    """Methods that do the same work, so that one of them is timed for all."""

    methods: tuple[str, ...]
    roles: tuple[Role, ...]

    @property
    def name(self) -> str:
        return ", ".join(self.methods)

    @property
    def method(self) -> Method:
        return METHODS[self.methods[0]]


def entries() -> list[Entry]:
    """All methods, in the order of `METHODS`."""
    found: dict[Any, list[str]] = {}
    for name, method in METHODS.items():
        work = (roles_of(method), method.draws, method.k, method.top_p, method.look_ahead, method.candidates,
                method.reward_form, method.keeps_rest, method.search, method.search_options)  # fmt: skip
        found.setdefault(work, []).append(name)
    return [Entry(tuple(names), work[0]) for work, names in found.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what is missing, then reports."""
    args = parse_arguments(arguments)
    runs = args.results / "runs.jsonl"
    if not args.report:
        with jax.set_mesh(start(DecodeConfig(mesh=args.mesh))):
            Measurement(args, runs).run()
    if not runs.exists():
        raise InputError(f"{runs}: is missing; run this without --report first")
    report(read(runs), args.results, PAGE if args.report else None)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary, description = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = f"a shape ({', '.join(SHAPES)}), or a folder or hub id"
    parser.add_argument("--lm", default="gpt2", help=f"the language model: {model}")
    parser.add_argument("--rm", default="gpt2", help=f"the reward model: {model}")
    parser.add_argument("--arm", help="of real models: the autoregressive reward model, also the aligned and tuned one")
    parser.add_argument("--table", help="of real models: the reward model with a table of rewards")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with tokenizers/")
    parser.add_argument("--tokenizer", help="of random weights: a folder, or demo (default: SHARED/tokenizers/gpt2)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights and products")
    parser.add_argument("--mesh", default="auto", help="as in decode.py")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="prompts answered together")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="measure only these (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="most runs of a method")
    parser.add_argument("--enough", type=float, default=9.0, help="seconds after which a method is not run again")
    parser.add_argument(
        "--longest", type=float, default=60.0, help="leave out what takes longer even at best, in seconds"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/studies/cost"), help="folder for random weights")
    parser.add_argument("--results", type=Path, default=Path("studies/cost/results"), help="folder for the results")
    parser.add_argument("--report", action="store_true", help=f"only report, and write the tables into {PAGE}")
    args = parser.parse_args(arguments)
    if min(*args.batch, args.tokens, args.rounds) < 1 or args.prompt < 2:
        raise InputError("--batch, --tokens and --rounds must be at least 1, --prompt at least 2")
    if (args.lm in SHAPES) != (args.rm in SHAPES):
        raise InputError(f"--lm {args.lm} and --rm {args.rm}: must both be shapes, or both be real models")
    return args


def model_sources(args: argparse.Namespace) -> dict[Role, str]:
    """A folder or hub id for each role. Models of a shape get random weights, which are written once."""
    if args.lm not in SHAPES:
        given = {"lm": args.lm, "rm": args.rm, "arm": args.arm, "table": args.table}
        return {role: source for role, source in given.items() if source is not None}
    folder = DEMO_LM if args.tokenizer == DEMO else Path(args.tokenizer or args.shared / "tokenizers" / "gpt2")
    if not folder.is_dir():
        raise InputError(f"{folder}: is not there; give a tokenizer's folder as --tokenizer, or demo")
    tokenizer = TextTokenizer.load(folder)
    sources = {}
    for seed, role in enumerate(("lm", "rm", "arm", "table", "parm")):
        shape = args.lm if role == "lm" else args.rm
        path = args.out / "models" / f"{shape}-{role}-{args.dtype}"
        if not (path / "config.json").exists():
            config = SHAPES[shape].__class__(**{**vars(SHAPES[shape]), "vocab_size": tokenizer.vocab_size})
            head = {"rm": "reward", "table": "table"}.get(role, "vocabulary")
            model = CausalModel(config, head, lora=PreferenceLora(2) if role == "parm" else None)
            params = random_params(model, seed, args.dtype)
            tokenizer.save(path)  # first: a folder with a config.json is complete
            special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
            save_model(path, model, params, special_tokens=special)
        sources[role] = str(path)
    return sources


def make_prompts(tokenizer: TextTokenizer, tokens: int, count: int) -> list[Prompt]:
    """Prompts of exactly so many tokens. Raises InputError if they cannot be made."""
    words = " ".join(row["prompt"] + row["chosen"] for row in preferences(200, seed=0)).split(" ")
    found: list[Prompt] = []
    start = 0
    while len(found) < count and start < len(words):
        end = start + 1
        while end < len(words) and len(tokenizer.encode_prompt(" ".join(words[start:end]))) < tokens:
            end += 1
        text = " ".join(words[start:end])
        if len(tokenizer.encode_prompt(text)) == tokens:
            found.append(Prompt(f"p{len(found)}", text))
        start += 1
    if len(found) < count:
        raise InputError(f"--prompt: found only {len(found)} texts of exactly {tokens} tokens, need {count}")
    return found


class Measurement:
    """Times what is not in the results yet, and adds each run to them as it ends."""

    def __init__(self, args: argparse.Namespace, results: Path) -> None:
        self.args, self.results = args, results
        self.sources = model_sources(args)
        self.rows = read(results) if results.exists() else []
        self.settings = {
            name: getattr(args, name) for name in ("lm", "rm", "arm", "table", "dtype", "prompt", "tokens")
        } | {"device": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}
        if not self.rows:
            best = dataclasses.asdict(ceilings(jnp.dtype(args.dtype)))
            self.add({"settings": self.settings, "machine": machine(), "ceilings": best})
        elif self.rows[0]["settings"] != self.settings:
            raise InputError(f"{results}: was made with other settings; give another --results")
        self.ceilings = Ceilings(**self.rows[0]["ceilings"])
        heads = {"rm": "reward", "table": "table"}
        self.models = {role: describe_model(each, heads.get(role, "vocabulary")) for role, each in self.sources.items()}
        self.unguided = Session(self.sources["lm"], dtype=args.dtype)
        self.prompts = make_prompts(self.unguided.tokenizer, args.prompt, max(args.batch))
        self.beside: dict[int, tuple[float, float]] = {}
        """By batch: when unguided decoding ended last, and its seconds."""
        self.scale: tuple[tuple[str, float], ...] = ()

    def run(self) -> None:
        """All methods, those with the same reward models together."""
        chosen = [e for e in entries() if self.args.methods is None or {*e.methods} & {*self.args.methods}]
        for roles in dict.fromkeys(entry.roles for entry in chosen):
            group = [entry for entry in chosen if entry.roles == roles]
            missing = [role for role in roles if role not in self.sources]
            todo = [(e, batch) for batch in self.args.batch for e in group if not missing and self.is_left(e, batch)]
            for entry in group if missing else ():
                self.leave_out(entry, 0, f"no model for it was given (--{missing[0]})")
            if todo:
                session = self.unguided
                if roles:
                    paths = [self.sources[role] for role in roles]
                    session = Session(self.sources["lm"], paths, method=group[0].method, dtype=self.args.dtype)
                for batch in self.args.batch:
                    self.measure(session, [e for e, b in todo if b == batch], batch)

    def is_left(self, entry: Entry, batch: int) -> bool:
        """Whether a method still has to be timed. Notes those that would take too long."""
        runs = self.runs_of(entry, batch)
        if runs or entry.method.search == "cards":  # whose work is not known beforehand
            return not self.has_enough(runs)
        least = least_seconds(self.passes(entry, batch), self.ceilings)
        if least > self.args.longest:
            self.leave_out(entry, batch, f"a run takes at least {least:.0f} s")
        return least <= self.args.longest

    def passes(self, entry: Entry, batch: int, drawn: int = 0, judged: int = 0) -> list[Pass]:
        itemsize, sizes = jnp.dtype(self.args.dtype).itemsize, {"prompt": self.args.prompt, "tokens": self.args.tokens}
        return list(passes(entry.method, self.models, itemsize, batch=batch, drawn=drawn, judged=judged, **sizes))

    def leave_out(self, entry: Entry, batch: int, reason: str) -> None:
        if not any(row.get("left_out") and (row["name"], row["batch"]) == (entry.name, batch) for row in self.rows):
            print(f"{entry.name}, batch {batch}: left out, {reason}", flush=True)
            self.add({"name": entry.name, "batch": batch, "left_out": reason})

    def runs_of(self, entry: Entry, batch: int) -> list[Row]:
        return [row for row in self.rows if "seconds" in row and (row["name"], row["batch"]) == (entry.name, batch)]

    def has_enough(self, runs: Sequence[Row]) -> bool:
        return len(runs) >= self.args.rounds or sum(row["seconds"] for row in runs) >= self.args.enough

    def measure(self, session: Session, todo: Sequence[Entry], batch: int) -> None:
        """Rounds over some methods, every other one backwards, so that none always runs after the same neighbour."""
        order, warm = list(todo), set()
        while order := [entry for entry in order if not self.has_enough(self.runs_of(entry, batch))]:
            for entry in order:
                beside = self.unguided_seconds(batch)
                answers = self.decode(session, entry.method, batch)
                if entry not in warm and seconds_of(answers) < SHORT:
                    answers = self.decode(session, entry.method, batch)
                warm.add(entry)
                row = {"name": entry.name, "batch": batch, "seconds": seconds_of(answers), "unguided": beside}
                self.add(row | self.work_of(entry, batch, answers))
                ratio = row["seconds"] / beside
                print(f"{entry.name}, batch {batch}: {row['seconds']:.2f} s, {ratio:.2f} x unguided", flush=True)
            order.reverse()

    def unguided_seconds(self, batch: int) -> float:
        """Seconds of unguided decoding, timed again if the last time is too long ago."""
        if batch not in self.beside:
            self.decode(self.unguided, METHODS[UNGUIDED], batch)  # warms up
        ended, seconds = self.beside.get(batch, (-np.inf, 0.0))
        if time.monotonic() - ended > SIDE_BY_SIDE:
            seconds = seconds_of(self.decode(self.unguided, METHODS[UNGUIDED], batch))
            self.beside[batch] = time.monotonic(), seconds
        return seconds

    def work_of(self, entry: Entry, batch: int, answers: Sequence[Answer]) -> Row:
        """The tokens that a run read, as its answers record them, and what it takes at least."""
        prompts = self.args.prompt * batch
        lm_tokens, rm_tokens = (sum(getattr(each, name) for each in answers) for name in ("lm_tokens", "rm_tokens"))
        found = self.passes(entry, batch, drawn=lm_tokens - prompts + batch, judged=rm_tokens - prompts)
        return {
            "tokens": sum(answer.tokens for answer in answers),
            "lm_tokens": lm_tokens - queries(found, guide=False, prompts=True),
            "rm_tokens": rm_tokens - queries(found, guide=True, prompts=True),
            "operations": operations(found),
            "least_seconds": least_seconds(found, self.ceilings),
        }

    def decode(self, session: Session, method: Method, batch: int) -> list[Answer]:
        preference = (0.5, 0.5) if method.reward_model == "preference" else ()
        search = self.reward_scale(session) if method.search == "cards" else ()
        settings = Settings(
            method, max_new_tokens=self.args.tokens, batch_size=batch, preference=preference, search=search
        )
        return [answer for found in session.answer(self.prompts[:batch], settings) for answer in found]

    def reward_scale(self, session: Session) -> tuple[tuple[str, float], ...]:
        """Mean and standard deviation of the rewards of unguided answers, as `cards` needs them; measured once, not in
        every run that is timed."""
        if not self.scale:
            method = METHODS["cards"]
            n = -(-SCALE_ANSWERS // len(self.prompts))
            settings = Settings(
                METHODS[UNGUIDED], k=method.k, temperature=method.temperature, max_new_tokens=self.args.tokens, n=n,
                batch_size=SCALE_ANSWERS,
            )  # fmt: skip
            answers = [answer for found in session.answer(self.prompts, settings) for answer in found]
            rewards = [answer.guide_rewards[0] for answer in answers]
            self.scale = ("mean", float(np.mean(rewards))), ("deviation", float(np.std(rewards)))
        return self.scale

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.results.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.results, "".join(json.dumps(each) + "\n" for each in self.rows))


def read(results: Path) -> list[Row]:
    return [json.loads(line) for line in results.read_text().splitlines()]


def seconds_of(answers: Iterable[Answer]) -> float:
    return sum(answer.seconds for answer in answers)


class Summary(NamedTuple):
    """A method at one batch size.

    Attributes:
        lm_tokens, rm_tokens: tokens read for a token of an answer, prompts left out.
        operations: over those of unguided decoding.
        milliseconds: for a token of an answer.
        least: the least possible milliseconds.
        times: a run's seconds over those of unguided decoding beside it.
    """

    name: str
    batch: int
    lm_tokens: float
    rm_tokens: float
    operations: float
    milliseconds: Spread
    least: float
    times: Spread


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """All methods that were timed, in the order of `METHODS`, by batch size."""
    timed = [row for row in rows if "seconds" in row]
    places = {entry.name: place for place, entry in enumerate(entries())}
    found = []
    for batch in sorted({row["batch"] for row in timed}):
        of_method: dict[str, list[Row]] = {}
        for row in timed:
            if row["batch"] == batch:
                of_method.setdefault(row["name"], []).append(row)
        for name in sorted(of_method, key=places.__getitem__):
            runs = of_method[name]
            alone = of_method.get(UNGUIDED, [{"operations": np.nan}])
            found.append(
                Summary(
                    name,
                    batch,
                    statistics.mean(run["lm_tokens"] / run["tokens"] for run in runs),
                    statistics.mean(run["rm_tokens"] / run["tokens"] for run in runs),
                    runs[0]["operations"] / alone[0]["operations"],
                    Spread.of(1e3 * run["seconds"] / run["tokens"] for run in runs),
                    1e3 * statistics.mean(run["least_seconds"] / run["tokens"] for run in runs),
                    Spread.of(run["seconds"] / run["unguided"] for run in runs),
                )
            )
    return found


def report(rows: Sequence[Row], folder: Path, page: Path | None) -> None:
    """Writes `results.json`, a table for each batch size and the figure; into the page too, if there is one."""
    summaries = summarise(rows)
    if not summaries:
        raise InputError(f"{folder}: has no timed runs")
    found = [
        each._asdict() | {name: vars(getattr(each, name)) for name in ("milliseconds", "times")} for each in summaries
    ]
    write_whole(folder / "results.json", json.dumps({**rows[0], "methods": found}, indent=1) + "\n")
    tables = {
        "costs": "\n".join(cost_table(summaries, rows, batch) for batch in dict.fromkeys(s.batch for s in summaries))
    }
    tables["machine"] = machine_line(rows[0])
    for name, text in tables.items():
        write_whole(folder / f"{name}.md", text)
        print(text)
    draw(summaries, folder / "costs.png")
    if page is not None:
        fill_page(page, tables)
        draw(summaries, FIGURE)
        print(f"wrote {page} and {FIGURE}")


def cost_table(summaries: Sequence[Summary], rows: Sequence[Row], batch: int) -> str:
    least_alone = next((each.least for each in summaries if (each.name, each.batch) == (UNGUIDED, batch)), np.nan)
    lines = [
        [
            each.name,
            f"{each.lm_tokens:.1f}",
            f"{each.rm_tokens:.1f}",
            f"{each.operations:.1f}",
            f"{each.milliseconds.median:.1f}",
            f"{each.least:.1f}",
            str(each.times) if len(each.times.runs) > 1 else f"{each.times.median:.2f}",
            f"{each.least / least_alone / each.times.median:.2f}",
            str(len(each.times.runs)),
        ]
        for each in summaries
        if each.batch == batch
    ]
    headings = [
        "method",
        "LM tokens",
        "RM tokens",
        "operations",
        "ms",
        "least ms",
        "times unguided",
        "of the roofline",
        "runs",
    ]
    timed = {each.name for each in summaries if each.batch == batch}
    reasons = {row["name"]: row["left_out"] for row in rows if "left_out" in row and row["batch"] in (0, batch)}
    left_out = [f"{name} ({reason})" for name, reason in reasons.items() if name not in timed]
    note = f"\nLeft out: {'; '.join(left_out)}.\n" if left_out else ""
    return f"Batch {batch}:\n\n{table(headings, lines)}{note}"


def machine_line(head: Row) -> str:
    known, best, settings = head["machine"], head["ceilings"], head["settings"]
    return (
        f"{settings['lm']} guided by {settings['rm']}, {settings['dtype']}, prompts of {settings['prompt']} tokens, "
        f"answers of {settings['tokens']}. {known['cpu']}, {known['cores']} cores, {known['device']}, JAX "
        f"{known['jax']}, {known['date']}, load at the start {known['load_1min']}; reads "
        f"{best['bandwidth'] / 1e9:.1f} GB/s, multiplies {best['matmul'] / 1e9:.0f} GFLOP/s.\n"
    )


def draw(summaries: Sequence[Summary], path: Path) -> None:
    """Bars of the time relative to unguided decoding, with the tokens of both models; a panel for each batch size."""
    from matplotlib.figure import Figure

    batches = list(dict.fromkeys(each.batch for each in summaries))
    names = list(dict.fromkeys(each.name for each in summaries))
    figure = Figure(figsize=(2.2 + 4.2 * len(batches), 0.9 + 0.27 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for axis, batch in zip(panels, batches, strict=True):
        here = [each for each in summaries if each.batch == batch]
        places = [names.index(each.name) for each in here]
        times = [each.times.median for each in here]
        reach = [[t - each.times.low for t, each in zip(times, here, strict=True)],
                 [each.times.high - t for t, each in zip(times, here, strict=True)]]  # fmt: skip
        colours = ["#0072b2" if each.rm_tokens else "#808080" for each in here]
        axis.barh(places, times, xerr=reach, color=colours, error_kw={"elinewidth": 0.8, "capsize": 2})
        for place, each in zip(places, here, strict=True):
            text = f"  {each.lm_tokens:.3g} + {each.rm_tokens:.3g}"
            axis.text(each.times.high, place, text, va="center", fontsize=7)
        axis.axvline(1, color="#1a1b1c", linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        axis.set_xlim(0.5, 4 * max(each.times.high for each in summaries))
        axis.set_title(f"batch {batch}", fontsize=10)
        axis.set_xlabel(
            "time of a token, times unguided (logarithmic)\nat the bars: tokens of the language model + reward models"
        )
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_as_command(main)
