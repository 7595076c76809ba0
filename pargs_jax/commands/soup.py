"""A model whose weights are the average of others': rewarded soups (Ramé et al., 2023, arXiv 2306.04488), the usual
baseline of several objectives. `python -m pargs_jax.commands.soup A B --weights 0.5 0.5 --out DIR`."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import jax

from pargs_jax.commands.command_line import Parser
from pargs_jax.commands.model_card import soup_card, write_card
from pargs_jax.commands.process import run_as_command
from pargs_jax.durable_files import write_errors_named_after
from pargs_jax.errors import InputError
from pargs_jax.models.hf import Pretrained, load_model, save_model, stored_head
from pargs_jax.models.sources import tokenizer_folder
from pargs_jax.text.tokenization import TextTokenizer


def soup(sources: Sequence[str], weights: Sequence[float], out: Path) -> None:
    """Writes the model of `sum_i weights_i theta_i`, computed in fp32, and its tokenizer as a Hugging Face folder.

    The models are those of one shape that were trained from the same model, each for its own reward. They are read one
    after another, so two are in memory.

    Raises InputError for weights that are negative, do not add up to 1 or are not one for each model, for models of
    different heads, configurations, prompt forms or tokenizers, and for a folder that already holds something.
    """
    _check_weights(sources, weights)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out: {out} already holds something; give another folder")
    first, tokenizer = _load(sources[0])
    total = jax.tree.map(lambda x: weights[0] * x, first.params)
    for source, weight in zip(sources[1:], weights[1:], strict=True):
        other, other_tokenizer = _load(source)
        _check_alike(sources[0], first, source, other)
        if not tokenizer.same_vocabulary(other_tokenizer) or first.eos_ids != other.eos_ids:
            raise InputError(f"{source}: its tokenizer differs from {sources[0]}'s; averaged models must share one")
        total = jax.tree.map(lambda x, y, weight=weight: x + weight * y, total, other.params)
    with write_errors_named_after(out, "give another --out"):
        save_model(out, first.model, total, special_tokens=first.special_tokens, prompt_form=first.prompt_form)
        tokenizer.save(out)
        write_card(out, soup_card(sources, weights))


def _check_weights(sources: Sequence[str], weights: Sequence[float]) -> None:
    given = " ".join(f"{weight:g}" for weight in weights)
    if len(sources) < 2:
        raise InputError(f"got {len(sources)} model; an average needs at least 2")
    if len(weights) != len(sources):
        raise InputError(f"--weights: got {given} for {len(sources)} models; give one for each")
    if not all(weight >= 0 for weight in weights) or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise InputError(f"--weights: got {given}, must be at least 0 and add up to 1")


def _load(source: str) -> tuple[Pretrained, TextTokenizer]:
    head = stored_head(source)
    if head is None:
        raise InputError(f"{source}: its config.json does not say which head it has (architectures)")
    found = load_model(source, head)
    if found.new_head:
        raise InputError(f"{source}: has no weights for its {head} head, so it cannot be averaged")
    if found.model.lora is not None:
        raise InputError(f"{source}: takes a preference vector, so it cannot be averaged")
    return found, TextTokenizer.load(tokenizer_folder(source), found.eos_ids)


def _check_alike(name: str, first: Pretrained, other_name: str, other: Pretrained) -> None:
    """Raises InputError unless the second can be averaged with the first."""
    says = {
        "kind": [type(found.model.config).__name__.removesuffix("Config") for found in (first, other)],
        "head": [found.model.head for found in (first, other)],
        "prompt form": [found.prompt_form for found in (first, other)],
    }
    if says["kind"][0] == says["kind"][1]:
        for field in dataclasses.fields(first.model.config):
            says[field.name] = [getattr(found.model.config, field.name) for found in (first, other)]
    for what, (mine, theirs) in says.items():
        if mine != theirs:
            raise InputError(f"{other_name}: cannot be averaged with {name}: its {what} is {theirs}, not {mine}")


def main() -> None:
    parser = Parser(
        prog="python -m pargs_jax.commands.soup",
        description="Average the weights of models trained from the same model, each for a different reward.",
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", help="runs of train.py, Hugging Face folders or hub ids")
    parser.add_argument(
        "--weights", metavar="X", type=float, nargs="+", required=True, help="weight of each model; they add up to 1"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for the averaged model")
    given = parser.parse_args()
    soup(given.models, given.weights, given.out)
    print(f"saved the model to {given.out}")


if __name__ == "__main__":
    run_as_command(main)
