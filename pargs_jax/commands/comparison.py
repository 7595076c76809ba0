"""The demo's comparison: every method on the same unseen prompts, judged by the oracle."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from pargs_jax.commands.demo import REWARD_MODELS, demo_prompts, demo_reward_model
from pargs_jax.commands.generate import decode_all, open_session, settings_of
from pargs_jax.config import DecodeConfig
from pargs_jax.config_files import to_yaml
from pargs_jax.decoding.methods import METHODS, Method
from pargs_jax.demo import task as demo
from pargs_jax.errors import InputError
from pargs_jax.evaluation.statistics import Estimate
from pargs_jax.generation.output import answer_row
from pargs_jax.generation.session import Answer, Session
from pargs_jax.processes import on_first

SHOWN_EXAMPLES = 2
SHOWN_METHODS = ("top_k", "args", "pargs")


@dataclasses.dataclass(frozen=True)
class Row:
    """One method's results over the prompts."""

    method: str
    guide: str
    true_reward: Estimate
    guide_reward: Estimate
    tokens: Estimate
    tokens_per_second: float


def compare_methods(config: DecodeConfig, console: Console | None = None) -> list[Row]:
    """Decodes the demo's test prompts with every method and prints the table and a few answers side by side.

    ARGS is guided by the reward model trained on full answers where there is one (`runs/bt`), as it was published, and
    by the partial one where not; the table says which. With `--rm`, all guided methods use those. With `--out`, every
    answer is written there with its method and true reward. Returns the table's rows.
    """
    config.validate()
    console = console or Console(quiet=jax.process_index() > 0)
    if config.prompt is not None or config.prompts is not None:
        raise InputError(f"--method: needs one of {', '.join(METHODS)}, to answer prompts of your own")
    console.print(to_yaml(config).rstrip(), highlight=False, style="dim")
    if config.out is not None and Path(config.out).exists():
        raise InputError(f"{config.out}: already exists; give another --out")
    prompts = demo_prompts(config)
    sessions: dict[str, Session] = {}
    answers: dict[str, list[Answer]] = {}
    rows = []
    left_out = [name for name, method in METHODS.items() if method.reward_model not in (None, *REWARD_MODELS)]
    console.print(f"not compared, since they need other models: {', '.join(left_out)}", style="dim")
    for name, method in METHODS.items():
        if name in left_out:
            continue
        guides = config.rm or (str(_reward_model(method, console)),)
        label = " ".join(guides)
        if label not in sessions:
            sessions[label] = open_session(config, guides, METHODS["pargs"])
        settings = settings_of(_without_unused(config, method), method)
        found = decode_all(sessions[label], prompts, settings, name, console)
        answers[name] = found
        rows.append(_summarise(name, label if method.guided else "", found))
    console.print(_table(rows, len(prompts)))
    _print_examples(answers, [prompt.id for prompt in prompts[:SHOWN_EXAMPLES]], console)
    if config.out is not None:
        on_first(partial(_write, Path(config.out), answers))
        console.print(f"all answers are in {config.out}", highlight=False)
    return rows


def _without_unused(config: DecodeConfig, method: Method) -> DecodeConfig:
    """The options without those that one of the compared methods ignores."""
    defaults = DecodeConfig()
    return dataclasses.replace(config, **{name: getattr(defaults, name) for name in method.unused})


def _reward_model(method: Method, console: Console) -> Path:
    """The reward model that guides a method; the partial one scores the answers of a method without guidance."""
    if method.reward_model == "full" and not REWARD_MODELS["full"].exists():
        console.print(
            f"{REWARD_MODELS['full']} is not there (python train.py --objective.name bt): "
            f"ARGS is guided by {REWARD_MODELS['partial']}",
            style="yellow",
        )
        return demo_reward_model(METHODS["pargs"])
    return demo_reward_model(method if method.guided else METHODS["pargs"])


def _summarise(name: str, guide: str, answers: list[Answer]) -> Row:
    rewards = [sum(answer.guide_rewards) for answer in answers]
    tokens = [answer.tokens for answer in answers]
    return Row(
        name,
        guide,
        Estimate.of([demo.oracle(answer.prompt, answer.response) for answer in answers]),
        Estimate.of(rewards),
        Estimate.of(tokens),
        sum(tokens) / sum(answer.seconds for answer in answers),
    )


def _table(rows: list[Row], prompts: int) -> Table:
    table = Table(title=f"{prompts} unseen prompts (mean ± standard error)", box=SIMPLE)
    for heading in ("method", "guided by"):
        table.add_column(heading, no_wrap=True)
    for heading in ("true reward", "guide's reward", "tokens", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.method,
            " ".join(Path(guide).name for guide in row.guide.split()) or "-",
            str(row.true_reward),
            str(row.guide_reward),
            f"{row.tokens.mean:.1f}",
            f"{row.tokens_per_second:,.0f}",
        )
    return table


def _print_examples(answers: dict[str, list[Answer]], prompt_ids: list[str], console: Console) -> None:
    for prompt_id in prompt_ids:
        chosen = {name: next(a for a in answers[name] if a.id == prompt_id) for name in SHOWN_METHODS}
        table = Table("method", "answer", "true reward", title=chosen[SHOWN_METHODS[0]].prompt, title_justify="left")
        for name, answer in chosen.items():
            reward = demo.oracle(answer.prompt, answer.response)
            table.add_row(name, answer.response.strip(), f"{reward:.2f}")
        console.print(table)


def _write(path: Path, answers: dict[str, list[Answer]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for name, found in answers.items():
                for answer in found:
                    truth = demo.oracle(answer.prompt, answer.response)
                    row = {"method": name, **answer_row(answer), "true_reward": truth}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); give another --out") from error
