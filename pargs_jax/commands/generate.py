"""Answers by one method: to one prompt, a file of prompts, or the demo's."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool
from rich.console import Console

from pargs_jax.commands.command_line import show_config
from pargs_jax.commands.demo import demo_prompts, demo_reward_model, judged_by_oracle, model_source
from pargs_jax.config import DecodeConfig
from pargs_jax.data.preferences import Prompt, load_prompts
from pargs_jax.data_config import DEMO, PROMPT_COLUMNS, column_names
from pargs_jax.decoding.methods import METHODS, Method
from pargs_jax.errors import InputError
from pargs_jax.generation.output import AnswersFile
from pargs_jax.generation.session import Answer, Session, Settings
from pargs_jax.models.model import unrolls_by_default
from pargs_jax.processes import from_first, on_first
from pargs_jax.progress import ShownProgress
from pargs_jax.text.prompts import choose_form, get_form


def settings_of(config: DecodeConfig, method: Method) -> Settings:
    """How a config has answers decoded with a method. Raises InputError for an option that the method ignores, and for
    the wrong number of reward models or weights."""
    traced = "candidates" if config.trace_candidates else "tokens"
    settings = Settings(
        method,
        config.weight,
        config.k,
        config.temperature,
        config.max_new_tokens,
        config.batch_size,
        config.seed,
        config.n,
        None if config.trace is None else traced,
        config.top_p,
        config.gate_entropy,
        config.look_ahead,
        config.preference,
        tuple(config.search.given.items()),
        config.stop,
    )
    if config.rm:
        settings.guide_weights(len(config.rm))
    return settings


OpenModels = Callable[[DecodeConfig, Sequence[str | Path], Method], Session]
"""Opens a config's language model with reward models that guide a method, as `open_session` does."""


def generate(
    config: DecodeConfig, console: Console | None = None, open_models: OpenModels | None = None
) -> list[Answer]:
    """Answers the config's prompts with its method; prints the answers, or writes them to `out` with progress.

    The effective config and the progress go to standard error, so that the answers can be piped. `open_models` is
    called in place of `open_session`. Raises InputError for anything that cannot be used, before any decoding.
    """
    console = console or error_console()
    config, session, prompts, settings = prepare(config, console, open_models)
    if config.out is None:
        answers = decode_all(session, prompts, settings, config.method, console)
        print_responses(answers)
        say_true_reward(config, answers, console)
        return answers
    with ExitStack() as stack:
        file = on_first(lambda: stack.enter_context(AnswersFile(Path(config.out), config)))
        answered = on_first(lambda: file.answered(prompts, config.n))
        answered = from_first(np.array(answered or np.zeros((len(prompts), config.n)), bool))
        if answered.any():
            console.print(f"{config.out}: {answered.sum()} of {answered.size} answers are already there")
        answers = []
        for batch in _decode_batches(session, prompts, settings, config.method, console, answered):
            if file is not None:
                file.write(batch)
            answers += batch
    console.print(f"wrote {len(answers)} answers to {config.out}", highlight=False)
    say_true_reward(config, answers, console)
    return answers


class Prepared(NamedTuple):
    """All that decoding needs. `config` is the one in effect, with the form that prompts are written in."""

    config: DecodeConfig
    session: Session
    prompts: list[Prompt]
    settings: Settings


def prepare(config: DecodeConfig, console: Console, open_models: OpenModels | None = None) -> Prepared:
    """Loads what the config names, and shows the config in effect. `open_models` is called in place of `open_session`.
    Raises InputError for what cannot be used."""
    config.validate()
    if config.method is None:
        raise InputError(f"--method: is missing, must be one of {', '.join(METHODS)}")
    method = METHODS[config.method]
    settings = settings_of(config, method)
    is_demo = config.lm == DEMO and method.guided and not config.rm
    open_models = open_models or open_session
    session = open_models(config, [demo_reward_model(method)] if is_demo else config.rm, method)
    form = choose_form(config.format, session.remembered_forms, "--format")
    config = dataclasses.replace(config, format=form)
    numbers = config.numbers_in_effect
    show_config(config, console, numbers and f"in effect: {numbers}")
    return Prepared(config, session, _read_prompts(config, session), settings)


def error_console() -> Console:
    """Standard error, of the first process alone."""
    return Console(stderr=True, quiet=jax.process_index() > 0, soft_wrap=True)


def say_true_reward(config: DecodeConfig, answers: Sequence[Answer], console: Console) -> None:
    """Sums up answers to the demo's prompts; others have no true reward."""
    if answers and config.lm == DEMO and config.prompt is None and config.prompts is None:
        console.print(judged_by_oracle(answers), highlight=False)


def print_responses(answers: Sequence[Answer]) -> None:
    """Prints the answers' texts, in the first process alone."""
    for answer in answers if jax.process_index() == 0 else ():
        print(answer.response)


def open_session(config: DecodeConfig, reward_models: Sequence[str | Path], method: Method) -> Session:
    """The config's language model with reward models that guide a method."""
    return Session(
        model_source(config.lm),
        [str(path) for path in reward_models],
        method=method,
        dtype=config.dtype,
        lm_dtype=config.lm_dtype,
        rm_dtype=config.rm_dtype,
        unroll=unrolls(config, jax.default_backend()),
        rm_format=config.rm_format,
    )


def unrolls(config: DecodeConfig, platform: str) -> bool:
    """Whether layers run one by one on a platform, such as `tpu`."""
    return unrolls_by_default(platform) if config.unroll == "auto" else config.unroll == "yes"


def decode_all(
    session: Session, prompts: Sequence[Prompt], settings: Settings, name: str, console: Console
) -> list[Answer]:
    """All answers in the order of their prompts, with progress."""
    order = {prompt.id: number for number, prompt in enumerate(prompts)}
    answers = [answer for batch in _decode_batches(session, prompts, settings, name, console) for answer in batch]
    return sorted(answers, key=lambda answer: (order[answer.id], answer.sample))


def _decode_batches(
    session: Session,
    prompts: Sequence[Prompt],
    settings: Settings,
    name: str,
    console: Console,
    answered: Bool[np.ndarray, "P n"] | None = None,
) -> Iterable[list[Answer]]:
    total = len(prompts) * settings.n - (0 if answered is None else int(answered.sum()))
    with ShownProgress(console, name, total, transient=True) as progress:
        done, tokens, seconds = 0, 0, 0.0
        for batch in session.answer(prompts, settings, answered):
            done += len(batch)
            tokens += sum(answer.tokens for answer in batch)
            seconds += sum(answer.seconds for answer in batch)
            progress.update(done, f"{tokens / seconds:,.0f} tokens/s")
            yield batch


def _read_prompts(config: DecodeConfig, session: Session) -> list[Prompt]:
    form = get_form(config.format)
    if config.prompt is not None:
        text = form.render_text(config.prompt, session.tokenizer)
        return [Prompt("0", text, form.turns_of(config.prompt, session.tokenizer))]
    if config.prompts is not None:
        columns = column_names(config.columns, "--columns", PROMPT_COLUMNS)
        return load_prompts(config.prompts, form, session.tokenizer, columns=columns)[: config.limit]
    return demo_prompts(config)
