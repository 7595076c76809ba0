"""The passes through models that a method cannot do without, for the least possible time of its answers."""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from benchmarks.measure import Ceilings
from benchmarks.models import Work, causal_pass
from pargs_jax.decoding.methods import Method
from pargs_jax.models.causal import CausalModel

Role = Literal["rm", "table", "arm", "parm", "lm"]
"""What reward models are: a scalar head, a table of rewards, an autoregressive one, one with a preference vector, or
the language model itself, as the reference of a ratio."""


class Pass(NamedTuple):
    """One pass of a model over a batch: `queries` tokens, each of which attends to `seen` tokens on average.

    Attributes:
        is_guide: whether a reward model does it, or the language model.
        work: what it reads and computes at least.
        queries: tokens that are read, of all rows together.
        is_prompt: whether it reads the prompts.
    """

    is_guide: bool
    work: Work
    queries: int
    is_prompt: bool = False


def roles_of(method: Method) -> tuple[Role, ...]:
    """The reward models that a method is measured with."""
    if method.reward_model == "partial" and method.candidates in ("all", "top_k_of_sum") and method.search is None:
        return ("table",)
    if method.reward_model == "partial" and method.keeps_rest:
        return ("table",)
    return {
        None: (),
        "full": ("rm",),
        "partial": ("rm",),
        "autoregressive": ("arm",),
        "preference": ("parm",),
        "ratio": ("arm", "lm"),
        "look_ahead": ("arm", "rm"),
    }[method.reward_model]


def passes(
    method: Method,
    models: Mapping[str, CausalModel],
    itemsize: int,
    *,
    batch: int,
    prompt: int,
    tokens: int,
    drawn: int = 0,
    judged: int = 0,
) -> Iterator[Pass]:
    """The passes that a batch of answers needs, one after another: caches are kept, rows of a prompt share its keys and
    values, and the candidates of a step are read together.

    Args:
        method: the method, with its default options.
        models: by role; `lm` is the language model.
        itemsize: bytes of one number.
        batch: prompts.
        prompt: tokens of each prompt.
        tokens: tokens of each answer.
        drawn, judged: tokens of answers that both models read for the batch, for a method whose options do not say how
            many (`cards`).
    """
    options = dict(method.search_options)
    roles = roles_of(method)
    per_prompt = [1] * tokens
    if method.search in ("best_of_n", "smc"):
        per_prompt = [options.get("samples", options.get("particles"))] * tokens
    elif method.search == "chunk_beam":
        per_prompt = [options.get("beams", 1) * options["successors"]] * tokens
    elif method.search == "speculative_rejection":
        sizes = method.make_search({}).sizes(tokens)
        per_prompt = [sizes[min(t // options["chunk"], len(sizes) - 1)] for t in range(tokens)]
    elif method.search == "cards":
        per_prompt = [1] * -(-drawn // batch)

    def read(role: str, rows: int, answer: float, each: int = 1, *, logits: bool, guide: bool = True) -> Pass:
        """Every row reads `each` tokens after `answer` tokens of its own."""
        cached = int(batch * prompt + rows * answer)
        queries = rows * each
        work = causal_pass(
            models[role], itemsize, queries=queries, seen=prompt + answer + 1, cached=cached,
            logits=queries if logits else 0,
        )  # fmt: skip
        return Pass(guide, work, queries)

    def prefill(role: str, count: int, *, guide: bool = True) -> Pass:
        work = causal_pass(models[role], itemsize, queries=batch * count, seen=(count + 1) / 2)
        return Pass(guide, work, batch * count, is_prompt=True)

    yield prefill("lm", prompt - 1, guide=False)
    if method.draws == "contrastive":
        yield prefill("lm", prompt, guide=False)
    searches = method.search is not None
    for role in roles:
        reads_all = searches or role == "rm" or method.reward_model == "look_ahead"
        yield prefill(role, prompt if reads_all else prompt - 1)

    chunk = int(options.get("chunk", options.get("longest", tokens))) if method.judged else 0
    unread = 0
    for t, copies in enumerate(per_prompt):
        rows, answer = batch * copies, t % tokens
        yield read("lm", rows, answer, logits=True, guide=False)
        if method.draws == "contrastive":
            yield read("lm", rows, answer, method.k, logits=False, guide=False)
        elif method.reward_model == "look_ahead":
            for ahead in range(method.look_ahead):
                yield read("arm", rows * method.k, answer + ahead, logits=True)
            for role in roles[1:]:
                yield read(role, rows, answer, method.k * (method.look_ahead + 1), logits=False)
        elif method.judged:
            unread += 1
            if unread == chunk or t == len(per_prompt) - 1:
                each = unread * judged // drawn if method.search == "cards" else unread
                for role in roles:
                    yield read(role, rows, answer + 1 - unread, each, logits=role != "rm")
                unread = 0
        else:
            for role in roles:
                each = method.k + method.keeps_rest if role == "rm" else 1
                yield read(role, rows, answer, each, logits=role != "rm")


def least_seconds(found: list[Pass], ceilings: Ceilings) -> float:
    """The least time for passes one after another, each the greater of its bytes and its operations at the device's
    best rates."""
    return sum(ceilings.least_seconds(*each.work) for each in found)


def operations(found: list[Pass]) -> float:
    """Operations of all passes; a multiply-add is two."""
    return sum(each.work.operations for each in found)


def queries(found: list[Pass], *, guide: bool, prompts: bool) -> int:
    """Tokens read by reward models (`guide`) or by the language model, of prompts or of answers."""
    return sum(each.queries for each in found if (each.is_guide, each.is_prompt) == (guide, prompts))
