"""`decode.py --explain`: answers with guidance and without, and the page of both."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pargs_jax.commands.generate import decode_all, error_console, prepare, print_responses, say_true_reward
from pargs_jax.config import DecodeConfig
from pargs_jax.evaluation.explanation import write_page
from pargs_jax.generation.output import options_digest
from pargs_jax.generation.session import Answer
from pargs_jax.generation.traces import AnswerTrace
from pargs_jax.processes import on_first


def decode_and_explain(config: DecodeConfig, console: Console | None = None) -> list[Answer]:
    """Prints the answers to the config's prompts, and writes the page that explains them.

    The unguided answers are those of the same method and seed at weight 0, so that the page has the reward models'
    rewards of them too. Raises InputError for anything that cannot be used.
    """
    console = console or error_console()
    config, session, prompts, settings = prepare(config, console)
    settings = dataclasses.replace(settings, trace="candidates")
    answers = decode_all(session, prompts, settings, config.method, console)
    unguided: list[Answer] = []
    if settings.method.guided:
        without = dataclasses.replace(settings, weights=(0.0,))
        bare = [dataclasses.replace(prompt, weights=None) for prompt in prompts]
        unguided = decode_all(session, bare, without, "without guidance", console)
    options = options_digest(config)
    on_first(lambda: write_page(Path(config.explain), _traces(answers, options), _traces(unguided, options)))
    print_responses(answers)
    say_true_reward(config, answers, console)
    console.print(f"wrote the page that explains {len(answers)} answers to {config.explain}", highlight=False)
    return answers


def _traces(answers: Sequence[Answer], options: str) -> list[AnswerTrace]:
    return [dataclasses.replace(answer.trace, options=options) for answer in answers]
