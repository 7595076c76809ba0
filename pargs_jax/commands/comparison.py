"""The demo's comparison: methods on the same unseen prompts, judged by the oracle, as a table and a figure."""

import dataclasses
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import jax
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from pargs_jax.commands.command_line import show_config
from pargs_jax.commands.comparison_file import ComparisonFile
from pargs_jax.commands.demo import REWARD_MODELS, demo_prompts, demo_reward_model, true_reward
from pargs_jax.commands.demo_figure import Curve, draw_comparison
from pargs_jax.commands.generate import decode_all, open_session, settings_of
from pargs_jax.config import DecodeConfig
from pargs_jax.data.preferences import Prompt
from pargs_jax.decoding.methods import METHODS, Method
from pargs_jax.decoding.search.order_statistics import best_of_n_curve, best_of_n_kl
from pargs_jax.errors import InputError
from pargs_jax.evaluation.statistics import Estimate
from pargs_jax.generation.session import Answer, Session, Settings
from pargs_jax.processes import from_first, on_first

COMPARED: dict[str, float | None] = {
    "greedy": None,
    "args": 0.5,
    "pargs_greedy": 8.0,
    "top_k": None,
    "args_stochastic": 0.5,
    "best_of_n": None,
    "genarm": 0.5,
    "pargs": 8.0,
}
"""The methods of the table, greedy ones first, with their reward weights: of `CURVE_WEIGHTS` those with the highest
true reward on prompts of the evaluation split."""
CURVES = {"pargs": "PARGS", "args_stochastic": "ARGS, sampled", "genarm": "GenARM"}
CURVE_WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
CURVE_PROMPTS = 100
BEST_OF = 10
FIGURE = Path("runs/demo.png")
SHOWN_EXAMPLES = 2
SHOWN_METHODS = ("top_k", "args_stochastic", "pargs")


@dataclasses.dataclass(frozen=True)
class Row:
    """One method's results over the prompts."""

    method: str
    guide: str
    weight: float | None
    true_reward: Estimate
    kl: Estimate
    tokens_per_second: float


def compare_methods(config: DecodeConfig, console: Console | None = None) -> list[Row]:
    """Decodes the demo's test prompts with several methods; prints the table and a few answers side by side, and draws
    true reward against KL for all weights.

    ARGS is guided by the reward model trained on full answers where there is one (`runs/bt`), as it was published, and
    by the partial one where not; the table says which. GenARM is left out where its reward model (`runs/arm`) is
    missing. With `--rm`, all guided methods use those, and GenARM is left out. With `--out`, every answer
    of the table is written there with its method and true reward, method after method, and a second run continues after
    them; the figure lies beside it. Returns the table's rows, in the first process alone.
    """
    config.validate()
    console = console or Console(quiet=jax.process_index() > 0, markup=False, emoji=False)
    if config.prompt is not None or config.prompts is not None:
        raise InputError(f"--method: needs one of {', '.join(METHODS)}, to answer prompts of your own")
    show_config(config, console)
    comparison = _Comparison(config, demo_prompts(config), console)
    compared = comparison.methods()
    with ExitStack() as stack:
        file = None
        if config.out is not None:
            opened = partial(ComparisonFile, Path(config.out), config, comparison.prompts)
            file = on_first(lambda: stack.enter_context(opened()))
        answers = {name: _found_or_decoded(file, name, comparison) for name in compared}
    rows = on_first(lambda: [comparison.row(name, found) for name, found in answers.items()]) or []
    on_first(lambda: console.print(_table(rows, len(comparison.prompts))))
    shown = [prompt.id for prompt in comparison.prompts[:SHOWN_EXAMPLES]]
    on_first(lambda: _print_examples(answers, shown, console))
    if config.out is not None:
        console.print(f"all answers are in {config.out}", highlight=False)
    curves = [comparison.curve(name, label) for name, label in CURVES.items() if name in compared]
    curves.append(comparison.best_of_n_curve())
    points = {row.method: (row.kl.mean, row.true_reward) for row in rows}
    figure = FIGURE if config.out is None else Path(config.out).with_suffix(".png")
    on_first(lambda: console.print(draw_comparison(figure, curves, points), highlight=False))
    console.print(f"next: {_python()} decode.py --method pargs --limit 1 --explain runs/demo.html", highlight=False)
    return rows


class _Comparison:
    """Prompts, and the models that answer them, which are loaded once."""

    def __init__(self, config: DecodeConfig, prompts: list[Prompt], console: Console) -> None:
        self.config, self.prompts, self.console = config, prompts, console
        self._sessions: dict[str, Session] = {}

    def methods(self) -> list[str]:
        """The methods of the table: those of `COMPARED` whose reward models are there."""
        arm = REWARD_MODELS["autoregressive"]
        if self.config.rm or arm.exists():
            return [name for name in COMPARED if name != "genarm" or not self.config.rm]
        self.console.print(
            f"{arm} is not there (python train.py --objective.name arm): genarm is left out", style="yellow"
        )
        return [name for name in COMPARED if name != "genarm"]

    def answers(self, name: str, weight: float | None, prompts: list[Prompt] | None = None) -> list[Answer]:
        """The answers of a method at a weight; `--weight` wins over it."""
        settings = self._settings(name, weight)
        if name == "best_of_n":
            settings = dataclasses.replace(settings, search=(("samples", BEST_OF),), k=METHODS["top_k"].k)
        return self._decode(name, settings, prompts)

    def row(self, name: str, answers: list[Answer]) -> Row:
        tokens = sum(answer.tokens for answer in answers)
        settings = self._settings(name, COMPARED[name])
        return Row(
            name,
            self._guide(METHODS[name]) if METHODS[name].guided else "",
            settings.weights[0] if settings.weights and not METHODS[name].judged else None,
            Estimate.of(list(map(true_reward, answers))),
            Estimate.of([answer.kl for answer in answers]),
            tokens / sum(answer.seconds for answer in answers),
        )

    def curve(self, name: str, label: str) -> Curve:
        """True reward against KL over the weights, on the first prompts."""
        points = []
        for weight in CURVE_WEIGHTS:
            found = self.answers(name, weight, self.prompts[:CURVE_PROMPTS])
            kl, reward = np.mean([answer.kl for answer in found]), Estimate.of(list(map(true_reward, found)))
            points.append((float(kl), reward, f"{weight:g}"))
        return Curve(label, points)

    def best_of_n_curve(self) -> Curve:
        """The best of n samples by the partial reward model, for n up to `BEST_OF`: KL by its formula."""
        settings = dataclasses.replace(self._settings("top_k", None), n=BEST_OF)
        found = self._decode("top_k", settings, self.prompts[:CURVE_PROMPTS])
        by_prompt: dict[str, list[tuple[float, float]]] = {}
        for answer in found:
            by_prompt.setdefault(answer.id, []).append((sum(answer.guide_rewards), true_reward(answer)))
        means = np.array([best_of_n_curve(*np.array(pairs).T) for pairs in by_prompt.values()])
        start = float(np.mean([answer.kl for answer in found]))
        points = [(start + best_of_n_kl(n), Estimate.of(means[:, n - 1]), f"{n}") for n in (1, 2, 4, BEST_OF)]
        return Curve("best of n", points)

    def _settings(self, name: str, weight: float | None) -> Settings:
        """What the options ask of a method, less those that mean nothing to it."""
        config, defaults, unused = self.config, DecodeConfig(), METHODS[name].unused
        if weight is not None and not config.weight:
            config = dataclasses.replace(config, weight=(weight,))
        names = {field.name for field in dataclasses.fields(config)}
        config = dataclasses.replace(config, **{key: getattr(defaults, key) for key in unused if key in names})
        return settings_of(config, METHODS[name])

    def _decode(self, name: str, settings: Settings, prompts: list[Prompt] | None) -> list[Answer]:
        guide = self._guide(METHODS[name])
        if guide not in self._sessions:
            method = METHODS["genarm" if name == "genarm" else "pargs"]
            self._sessions[guide] = open_session(self.config, self.config.rm or (guide,), method)
        return decode_all(self._sessions[guide], prompts or self.prompts, settings, name, self.console)

    def _guide(self, method: Method) -> str:
        """The reward models that guide a method, or score the answers of one without guidance: the partial one."""
        if self.config.rm:
            return " ".join(self.config.rm)
        if method is METHODS["genarm"]:
            return str(demo_reward_model(method))
        is_args = method is METHODS["args"] or method is METHODS["args_stochastic"]
        if is_args and not REWARD_MODELS["full"].exists():
            self.console.print(
                f"{REWARD_MODELS['full']} is not there (python train.py --objective.name bt): "
                f"ARGS is guided by {REWARD_MODELS['partial']}",
                style="yellow",
            )
            is_args = False
        return str(demo_reward_model(METHODS["args" if is_args else "pargs"]))


def _found_or_decoded(file: ComparisonFile | None, name: str, comparison: _Comparison) -> list[Answer]:
    """The answers of a method: those in the file, or else new ones, which are written there. Only the first process has
    those in the file."""
    is_found = on_first(lambda: file is not None and name in file.found)
    if from_first(np.asarray(bool(is_found))):
        return on_first(lambda: file.found[name]) or []
    answers = comparison.answers(name, COMPARED[name])
    on_first(lambda: None if file is None else file.write(name, answers))
    return answers


def _python() -> str:
    """This interpreter as one would type it here: one in a folder below, such as `.venv`, need not be activated."""
    here, running = Path.cwd(), Path(sys.executable)
    return str(running.relative_to(here)) if running.is_relative_to(here) else "python"


def _table(rows: list[Row], prompts: int) -> Table:
    table = Table(title=f"{prompts} unseen prompts (mean ± standard error)", box=SIMPLE, padding=(0, 1))
    table.add_column("method", no_wrap=True)
    table.add_column("guided by", overflow="fold")
    for heading in ("weight", "true reward", "KL, nats", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.method,
            " ".join(Path(guide).name for guide in row.guide.split()) or "-",
            "-" if row.weight is None else f"{row.weight:g}",
            str(row.true_reward),
            f"{row.kl.mean:.1f}",
            f"{row.tokens_per_second:,.0f}",
        )
    return table


def _print_examples(answers: dict[str, list[Answer]], prompt_ids: list[str], console: Console) -> None:
    for prompt_id in prompt_ids:
        chosen = {name: next(a for a in answers[name] if a.id == prompt_id) for name in SHOWN_METHODS}
        table = Table(title=chosen[SHOWN_METHODS[0]].prompt, title_justify="left")
        table.add_column("method", no_wrap=True)
        table.add_column("answer")
        table.add_column("true reward")
        for name, answer in chosen.items():
            table.add_row(name, answer.response.strip(), f"{true_reward(answer):.2f}")
        console.print(table)
