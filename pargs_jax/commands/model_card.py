"""The card of an exported model (README.md): what it is, where it comes from, how good it is, and how to use it."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pargs_jax.config import TrainConfig
from pargs_jax.config_files import to_short_yaml
from pargs_jax.data_config import DEMO
from pargs_jax.durable_files import write_whole
from pargs_jax.errors import InputError
from pargs_jax.json_text import parse_json
from pargs_jax.text.prompts import get_form
from pargs_jax.text.tokenization import TextTokenizer
from pargs_jax.training.program import lora_of

CARD = "README.md"
MARK = "<!-- Written by pargs_jax, which replaces this file; without this line it leaves it alone. -->"

KINDS = {
    "reward": "a reward model: a scalar head, read at the last token of a text",
    "table": "a reward model whose head is a table: entry v is the reward of the text followed by token v",
    "vocabulary": "a language model",
}
METHODS = {
    "bt": "args", "partial_bt": "pargs", "rad": "rad", "fudge": "cd", "td_lambda": "vas", "cd_q": "cd",
    "farma": "farma", "distill": "farma", "ctl": "smc", "arm": "genarm", "parm": "parm",
}  # fmt: skip
"""The method that each objective's models usually guide. Other objectives make language models to decode from."""


def write_card(folder: Path, text: str) -> bool:
    """Writes a card unless the folder has a README.md that somebody else wrote. Returns whether it did."""
    path = folder / CARD
    if path.exists() and (not path.is_file() or MARK not in path.read_text(encoding="utf-8", errors="replace")):
        return False
    write_whole(path, text)
    return True


def training_card(
    config: TrainConfig, tokenizer: TextTokenizer, metrics: Mapping[str, float], *, rows: int, is_adapter: bool = False
) -> str:
    """The card of a model that `train.py` trained.

    Args:
        config: the run's options, with the prompt form that was used.
        tokenizer: the model's tokenizer.
        metrics: the last evaluation's, by name; empty if there was none.
        rows: how many rows it was trained on.
        is_adapter: whether the folder holds the low-rank additions alone.
    """
    loss, name = config.objective.loss, config.objective.name
    start = _code(config.model.init)
    what = f"{KINDS[loss.head]}, trained with the objective `{name}` ({loss.meaning})"
    if is_adapter:
        what = f"a PEFT adapter that makes {start} {what}. It is merged where it is loaded"
    trained = [
        f"- From: {start}{' (its architecture only, at random)' if config.model.from_scratch else ''}",
        f"- On: {_data(config)}, {rows:,} rows",
    ]
    if (lora := lora_of(config)) is not None:
        trained.append(f"- What was trained: low-rank additions of rank {lora.rank} to the layers `{lora.layers}`")
    options = to_short_yaml(config)
    sections = [
        _front(config, is_adapter),
        f"# {config.output_folder.name}\n\nThis is {what}.",
        "## Training\n\n" + "\n".join(trained),
        f"All options that differ from their defaults, as `train.py --config` reads them:\n\n```yaml\n{options}```"
        if options
        else "All options have their defaults.",
        _evaluation(metrics),
        "## How to use it\n\n" + _use(config),
        "## How it must be prompted\n\n" + _prompting(config.data.format, tokenizer),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def soup_card(sources: Sequence[str], weights: Sequence[float]) -> str:
    """The card of a model whose weights are the average of others'."""
    parts = "\n".join(f"- {weight:g} times {_code(source)}" for source, weight in zip(sources, weights, strict=True))
    return f"{MARK}\n\n# An average of models\n\nIts weights are\n\n{parts}\n\nIt is used and prompted as they are.\n"


def last_evaluation(metrics_file: Path) -> dict[str, float]:
    """The metrics of the last evaluation in a run's `metrics.jsonl`; empty if there is none."""
    if not metrics_file.is_file():
        return {}
    for line in reversed(metrics_file.read_bytes().splitlines()):
        try:
            found = parse_json(line)
        except InputError:  # a kill may cut off a line
            continue
        if isinstance(found, dict) and found.get("split") == "eval":
            return {name: value for name, value in found.items() if isinstance(value, float)}
    return {}


def _front(config: TrainConfig, is_adapter: bool) -> str:
    """The lines that the hub reads."""
    is_rewarded = config.objective.loss.head == "reward"
    lines = [
        f"library_name: {'peft' if is_adapter else 'transformers'}",
        f"pipeline_tag: {'text-classification' if is_rewarded else 'text-generation'}",
        f"tags: [pargs_jax, {config.objective.name}{', reward-model' if config.objective.name in METHODS else ''}]",
    ]
    if _is_hub_id(config.model.init):
        lines.append(f"base_model: {json.dumps(config.model.init.partition('@')[0])}")
    return "---\n" + "\n".join(lines) + f"\n---\n\n{MARK}"


def _data(config: TrainConfig) -> str:
    if config.data.train == DEMO:
        return "the built-in task of pargs_jax"
    return f"{_code(config.data.train)}, cut to {config.max_length} tokens"


def _evaluation(metrics: Mapping[str, float]) -> str:
    """The metrics of held-out rows; those by prefix in a table of their own."""
    if not metrics:
        return ""
    by_prefix = {name[9:]: value for name, value in metrics.items() if re.fullmatch(r"accuracy_\d+", name)}
    whole = {name: value for name, value in metrics.items() if name.removeprefix("accuracy_") not in by_prefix}
    text = "## Held-out rows\n\n| metric | value |\n| --- | ---: |\n"
    text += "\n".join(f"| {name} | {value:.4g} |" for name, value in whole.items())
    if by_prefix:
        text += "\n\nAccuracy on pairs of prefixes, by how much of the longer answer they hold:\n\n"
        text += f"| {' | '.join(f'{percent} %' for percent in by_prefix)} |\n|{' ---: |' * len(by_prefix)}\n"
        text += f"| {' | '.join(f'{value:.3f}' for value in by_prefix.values())} |"
    return text


def _use(config: TrainConfig) -> str:
    method = METHODS.get(config.objective.name)
    here, files = "PATH_OF_THIS_FOLDER", "--prompts prompts.jsonl --out answers.jsonl"
    if method is None and config.objective.loss.head == "vocabulary":
        return f"```sh\npython decode.py --lm {here} --method top_p {files}\n```"
    lm = config.model.init if config.model.init != DEMO else "LANGUAGE_MODEL"
    method = method or "pargs"
    extra = " --preference 0.5 0.5" if method == "parm" else ""
    return (
        f"It guides a language model, such as {_code(config.model.init)}; with another `--lm`, see docs/models.md:\n\n"
        f"```sh\npython decode.py --lm {lm} --rm {here} --method {method}{extra} {files}\n```"
    )


def _prompting(form: str | None, tokenizer: TextTokenizer) -> str:
    name = form or "plain"
    if name == "plain":
        text = "Prompts are read as they are, without any markers (`--format plain`)."
    else:
        turns = [{"role": "user", "content": "QUESTION"}]
        try:
            prompt = get_form(name).render(turns, tokenizer)
        except InputError:  # a template that wants a system turn, for one
            return f"With the format `{name}`."
        text = f"With `--format {name}`, which `decode.py` remembers. One question then becomes\n\n```\n{prompt}\n```"
    end = tokenizer.token(tokenizer.eos_id)
    return f"{text}\n\nA finished answer ends with `{end}`; an unfinished one with its last token."


def _code(name: str) -> str:
    """A model or file by its name. A local path is nobody else's business but its last part."""
    return f"`{name}`" if _is_hub_id(name) or name == DEMO else f"`{Path(name).name}`"


def _is_hub_id(name: str) -> bool:
    return name != DEMO and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) is not None and not Path(name).exists()
