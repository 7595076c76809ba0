"""What `python evaluate.py` does: answers files in, a report out."""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from pargs_jax.commands.demo import REWARD_MODELS
from pargs_jax.commands.generate import generate, open_session
from pargs_jax.config import DecodeConfig
from pargs_jax.config_files import read_yaml
from pargs_jax.data.preferences import Preference, load_preferences
from pargs_jax.data_config import DEMO, column_names
from pargs_jax.decoding.methods import METHODS, Method
from pargs_jax.demo import task as demo
from pargs_jax.durable_files import write_errors_named_after, write_whole
from pargs_jax.errors import InputError, first_line, warn
from pargs_jax.evaluation.answers import System, check_prompts, load_systems, name_and_file
from pargs_jax.evaluation.config import REFERENCE_NAMES, EvaluateConfig
from pargs_jax.evaluation.endpoint import Comparison, PairwiseJudge
from pargs_jax.evaluation.figures import Drawn, check_matplotlib, draw
from pargs_jax.evaluation.judges import (
    FunctionJudge,
    Judge,
    RewardModelJudge,
    RougeJudge,
    check_prompt_form,
    load_references,
)
from pargs_jax.evaluation.page import page
from pargs_jax.evaluation.prefixes import (
    PrefixRewards,
    RewardModelReport,
    function_prefix_rewards,
    model_prefix_rewards,
    report_on,
    with_agreement,
)
from pargs_jax.evaluation.report import (
    Metric,
    Report,
    given_metrics,
    make_report,
    metric_of_answers,
    text_metrics,
)
from pargs_jax.evaluation.scoring import ScoringModel
from pargs_jax.evaluation.sweeps import Setting, settings
from pargs_jax.evaluation.tables import print_tables, tables
from pargs_jax.generation.guidance import roles_of
from pargs_jax.generation.session import Session
from pargs_jax.models.sources import resolve
from pargs_jax.progress import ShownProgress
from pargs_jax.text.prompts import choose_form, get_form

DEMO_PAIRS = 1000


def run(config: EvaluateConfig) -> None:
    """What `evaluate.py` does. The exit code is 1 if a judge failed, so that the report lacks it or a part of it."""
    if evaluate(config).problems:
        sys.exit(1)


def evaluate(config: EvaluateConfig, console: Console | None = None) -> Report:
    """Evaluates what the config names, prints the tables, and writes the report into its folder.

    What cannot be used is refused before any work. Afterwards a judge that fails takes nothing else with it: the report
    is written without it, and says so in `problems`.
    """
    config.validate()
    console = console or Console(markup=False, emoji=False)
    if config.figures:
        check_matplotlib()
    given = [name_and_file(word) for word in config.answers]
    folder = Path(config.out)
    with write_errors_named_after(folder, "give another --out"):
        folder.mkdir(parents=True, exist_ok=True)
    swept = _swept(config)
    functions = {name: FunctionJudge(name) for name in config.function}
    for source in (*config.rm, *config.guide, *filter(None, [config.perplexity])):
        resolve(source)  # what is not there is said before anything is decoded
    pairs_of = _pairs_reader(config)
    problems: list[str] = []
    metrics, comparisons = [], {}
    with ExitStack() as stack:
        asked = None
        if config.endpoint.url is not None:
            cache = Path(config.endpoint.cache or folder / "replies.jsonl")
            asked = stack.enter_context(PairwiseJudge(config.endpoint, cache))
        files = [*given, *_decode_missing(swept, folder, config.mesh)]
        systems = load_systems(files, guides_of=guides_of)
        baseline = _baseline(config, systems)
        _refuse_guides(config, systems)
        if baseline is not None:
            references = {}
            if config.references.file is not None:
                columns = column_names(config.references.columns, "--references.columns", REFERENCE_NAMES)
                references = load_references(config.references.file, columns, systems)
            check_prompts(systems, baseline)
            metrics = _judged(config, systems, functions, references, problems)
            metrics += [*given_metrics(systems), *_perplexity(config, systems, problems), *text_metrics(systems)]
            comparisons = {} if asked is None else _compared(asked, systems, baseline, problems)
    reward_models = _reward_models(config, functions, pairs_of, problems)
    report = make_report(
        systems,
        baseline.name if baseline else "",
        metrics,
        comparisons,
        reward_models,
        problems,
        seed=config.seed,
    )
    write_report(report, folder, figures=config.figures, examples=config.examples)
    print_tables(tables(report), console)
    for line in problems:
        warn(line)
    console.print(
        f"wrote the report to {folder / 'report.html'} and its numbers to {folder / 'report.json'}", highlight=False
    )
    return report


def write_report(report: Report, folder: Path, *, figures: bool = True, examples: int = 10) -> None:
    """Writes `report.json`, `report.html`, `values.jsonl` and, with `figures`, a folder of these. Raises InputError if
    they cannot be written."""
    with write_errors_named_after(folder, "give another --out"):
        write_whole(folder / "report.json", report.to_json())
        write_whole(folder / "values.jsonl", "".join(json.dumps(row) + "\n" for row in _values(report)))
        drawn: list[Drawn] = draw(report, folder / "figures") if figures else []
        write_whole(folder / "report.html", page(report, drawn, examples))


def _values(report: Report) -> list[dict[str, Any]]:
    """Every number of every answer, a row an answer."""
    return [
        {"system": system.name, "id": answer.id, "sample": answer.sample}
        | {
            metric.name: metric.by_answer[system.name][place]
            for metric in report.metrics
            if system.name in metric.by_answer
        }
        for system in report.systems
        for place, answer in enumerate(system.answers)
    ]


def _swept(config: EvaluateConfig) -> list[Setting]:
    if not config.sweep:
        return []
    if config.decode is None:
        return settings(config.sweep, {})
    # The options of an earlier run serve as well; where that wrote its answers does not matter here.
    base = {name: value for name, value in read_yaml(config.decode).items() if name != "out"}
    return settings(config.sweep, base, f"{config.decode} with --sweep")


def _decode_missing(swept: Sequence[Setting], folder: Path, mesh: str) -> list[tuple[str, str]]:
    """Decodes what the sweep's answers files lack; returns them, each with its name. Settings with the same models load
    them once, one after the other."""
    loaded: dict[Any, Session] = {}

    def remembered(config: DecodeConfig, reward_models: Sequence[str | Path], method: Method) -> Session:
        sources = tuple(map(str, reward_models))
        formats = config.dtype, config.lm_dtype, config.rm_dtype, config.rm_format
        key = (config.lm, sources, roles_of(method, sources), config.unroll, *formats)
        if key not in loaded:
            loaded.clear()
            loaded[key] = open_session(config, reward_models, method)
        return loaded[key]

    found = []
    for setting in swept:
        out = folder / "answers" / setting.file
        generate(dataclasses.replace(setting.config, out=str(out), mesh=mesh), open_models=remembered)
        found.append((setting.name, str(out)))
    return found


def guides_of(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The reward models that guided answers made with these options of `decode.py`."""
    method = METHODS.get(str(options.get("method")))
    if method is not None and not method.guided:
        return ()
    given = tuple(options.get("rm") or ())
    if given or options.get("lm") != DEMO:
        return given
    # In the demo's comparison the full model stands in for itself only where it was there; both count as guides then.
    kinds = REWARD_MODELS if method is None else REWARD_MODELS.keys() & {method.reward_model}
    return tuple(str(path) for kind, path in REWARD_MODELS.items() if kind in kinds)


def _baseline(config: EvaluateConfig, systems: Sequence[System]) -> System | None:
    if config.baseline is None:
        return systems[0] if systems else None
    found = [system for system in systems if system.name == config.baseline]
    if not found:
        names = ", ".join(system.name for system in systems) or "none"
        raise InputError(f"--baseline {config.baseline}: no answers have that name, must be one of {names}")
    return found[0]


def _refuse_guides(config: EvaluateConfig, systems: Sequence[System]) -> None:
    for source in config.rm:
        for system in systems:
            if any(_same_model(source, guide) for guide in system.guides or ()):
                raise InputError(
                    f"--rm {source}: guided the answers of {system.name!r}, so it cannot judge them; "
                    "give it as --guide to score them anyway"
                )


def _same_model(source: str, other: str) -> bool:
    """Whether two names are one model: the same folder, or the same hub id."""
    if source == other:
        return True
    folders = [Path(name) for name in (source, other)]
    if not all(folder.is_dir() for folder in folders):
        return False
    return resolve(source).resolve() == resolve(other).resolve()


def _judged(
    config: EvaluateConfig,
    systems: Sequence[System],
    functions: Mapping[str, FunctionJudge],
    references: Mapping[str, Sequence[str]],
    problems: list[str],
) -> list[Metric]:
    """The scores of every judge; one that fails becomes a line in `problems`."""
    options: dict[str, Any] = {"dtype": config.dtype, "weights": config.rm_dtype, "batch_size": config.batch_size}
    options["prefers_template"] = config.rm_format == "auto"
    makers: list[tuple[str, Callable[[], Judge]]] = [
        (name, lambda judge=judge: judge) for name, judge in functions.items()
    ]
    for source in (*config.rm, *config.guide):
        is_guide = source in config.guide
        makers.append((source, lambda s=source, g=is_guide: RewardModelJudge(s, is_guide=g, **options)))
    if references:
        makers += [(kind, lambda kind=kind: RougeJudge(kind, references)) for kind in RougeJudge.KINDS]
    metrics = []
    for name, make in makers:
        try:
            judge = make()
            with _progress(name, sum(len(system.answers) for system in systems)) as progress:
                scores, done = {}, 0
                for system in systems:
                    scores[system.name] = judge.scores(system)
                    done += len(system.answers)
                    progress.update(done, system.name)
        except InputError as error:
            problems.append(f"judge {name}: {error}")
            continue
        unknown = ", ".join(system.name for system in systems if system.guides is None) if name in config.rm else ""
        meaning = judge.meaning + (f" (the guides of {unknown} are unknown)" if unknown else "")
        reasons = dict(judge.problems)
        metrics.append(
            metric_of_answers(judge.name, meaning, "judge", systems, scores, is_guide=judge.is_guide, problems=reasons)
        )
    return metrics


def _perplexity(config: EvaluateConfig, systems: Sequence[System], problems: list[str]) -> list[Metric]:
    """Nats a token of each answer's text, its end not counted, under a third language model."""
    if config.perplexity is None:
        return []
    try:
        model = ScoringModel.load(config.perplexity, "vocabulary", dtype=config.dtype, batch_size=config.batch_size)
        scores, left_out = {}, 0
        for system in systems:
            check_prompt_form(model, system)
            texts = [model.tokenise(answer.prompt, answer.response, closed=False) for answer in system.answers]
            read = [text is not None and len(text.answer) > 0 for text in texts]
            found = iter(model.log_likelihoods([text for text, taken in zip(texts, read, strict=True) if taken]))
            scores[system.name] = [
                -next(found) / len(text.answer) if taken else None for text, taken in zip(texts, read, strict=True)
            ]
            left_out += read.count(False)
    except InputError as error:
        problems.append(f"--perplexity {config.perplexity}: {error}")
        return []
    reasons = {"empty, or longer than the model's context": left_out} if left_out else {}
    meaning = (
        f"nats per token of an answer under {config.perplexity}, without its end-of-sequence token; the exponential "
        "of their mean over prompts is the perplexity"
    )
    return [metric_of_answers("nats_per_token", meaning, "likelihood", systems, scores, problems=reasons)]


def _compared(
    judge: PairwiseJudge, systems: Sequence[System], baseline: System, problems: list[str]
) -> dict[str, dict[str, dict[str, list[Comparison]]]]:
    """What the endpoint says of every system beside the baseline."""
    found: dict[str, dict[str, list[Comparison]]] = {}
    try:
        for system in systems:
            if system is not baseline:
                with _progress(f"{judge.name}: {system.name}", len(system.answers)) as progress:
                    found[system.name] = judge.compare(system, baseline, lambda done, _, p=progress: p.update(done, ""))
    except InputError as error:
        problems.append(f"judge {judge.name}: {error}")
    missing = sum(each.is_missing for system in found.values() for every in system.values() for each in every)
    if missing:
        problems.append(
            f"judge {judge.name}: {missing} pairs have no verdict ({judge.failure}); run the same command again to "
            "ask for only these"
        )
    return {judge.name: found}


def _reward_models(
    config: EvaluateConfig,
    functions: Mapping[str, FunctionJudge],
    pairs_of: Callable[[ScoringModel | None], list[Preference]],
    problems: list[str],
) -> list[RewardModelReport]:
    """The test of every reward model on preference pairs; one that fails becomes a line in `problems`."""
    if config.pairs.file is None:
        return []
    found = []
    for source in (*config.rm, *config.guide, *functions):
        try:
            if source in functions:
                name, pairs = functions[source].name, pairs_of(None)
                with _progress(name, 1) as progress:
                    rewards = function_prefix_rewards(
                        functions[source].score, pairs, lambda note, p=progress: p.update(0, note)
                    )
            else:
                name = source
                rewards = _prefix_rewards(config, source, config.rm_dtype, pairs_of)
                if config.rm_dtype == "int8":
                    exact = _prefix_rewards(config, source, None, pairs_of)
                    rewards = with_agreement(rewards, exact, config.dtype)
            found.append(report_on(name, rewards, config.seed))
        except InputError as error:
            problems.append(f"reward model {source}: {first_line(error)}")
    return found


def _prefix_rewards(
    config: EvaluateConfig,
    source: str,
    weights: str | None,
    pairs_of: Callable[[ScoringModel | None], list[Preference]],
) -> PrefixRewards:
    """A model's rewards of the pairs' prefixes, with progress; `weights` is the format of its weights, if not that of
    the computation."""
    options = {"dtype": config.dtype, "weights": weights, "batch_size": config.batch_size}
    model = ScoringModel.load(source, "reward", **options)
    pairs = pairs_of(model)
    with _progress(source, 1) as progress:
        model.read = lambda note: progress.update(0, note)
        return model_prefix_rewards(model, pairs, config.pairs.max_length)


def _pairs_reader(config: EvaluateConfig) -> Callable[[ScoringModel | None], list[Preference]]:
    """How the pairs are read, in the form that is asked for or that a model was trained with; with `plain`, they are
    read now, so that a file that cannot be is refused at once."""
    columns = column_names(config.pairs.columns, "--pairs.columns")

    def read(model: ScoringModel | None) -> list[Preference]:
        if config.pairs.file == DEMO:
            return [Preference(**row) for row in demo.preferences(config.pairs.limit or DEMO_PAIRS, split="test")]
        remembered = [] if model is None else [[(model.source, model.prompt_form)]]
        form = get_form(choose_form(config.pairs.format, remembered, "--pairs.format"))
        tokenizer = None if model is None else model.tokenizer
        loaded = load_preferences(config.pairs.file, form, tokenizer=tokenizer, split="eval", columns=columns)
        if loaded.bad_rows:
            first = loaded.bad_rows[0]
            warn(f"{config.pairs.file}: {len(loaded.bad_rows)} rows cannot be used; line {first.line}: {first.reason}")
        return loaded.rows[: config.pairs.limit]

    if config.pairs.file is not None and config.pairs.format not in (None, "chat"):
        read(None)
    return read


def _progress(name: str, total: int) -> ShownProgress:
    return ShownProgress(Console(stderr=True, soft_wrap=True, markup=False, emoji=False), name, total, transient=True)
