"""What guided decoding costs, in operations: the count of PARGS, section 5.3, for any pair of models.

The paper takes a candidate to cost the reward model one token, `2N` operations for N weights. That holds for a causal
reward model with a cache, and for an encoder with prefix-causal attention. An encoder as published, such as DeBERTa-v3,
has no cache: every candidate is a new text, all of which it reads, and the count is the text's length times larger.
"""

from typing import Any, NamedTuple

import jax

from pargs_jax.models.causal import CausalModel
from pargs_jax.models.model import AnyRewardModel, Model


class StepOperations(NamedTuple):
    """Operations of one decoding step of one row; a multiply-add is two."""

    language_model: float
    guide: float

    @property
    def overhead(self) -> float:
        """What guidance adds, in steps of the language model alone."""
        return self.guide / self.language_model


def step_operations(
    lm: CausalModel,
    rm: AnyRewardModel,
    *,
    text: int,
    k: int = 10,
    rm_text: int | None = None,
) -> StepOperations:
    """Operations for the next token after `text` tokens of prompt and answer, both models cached where they can be.

    Matrix products are counted: of the layers, the attention scores and mixes (relative positions included), and the
    vocabulary's logits. Norms, activations and the reward head are not.

    Args:
        lm: the language model.
        rm: the reward model; its kind says what it must read again.
        text: tokens so far.
        k: candidates a step.
        rm_text: tokens of the same text in the reward model's tokenizer; by default as many.
    """
    rm_text = text if rm_text is None else rm_text
    logits = 2 * lm.config.vocab_size * lm.config.head_width
    read_again = 1 if rm.one_pass else rm_text + 1
    return StepOperations(
        token_operations(lm, seen=text) + logits, k * read_again * token_operations(rm, seen=rm_text + 1)
    )


def token_operations(model: Model, *, seen: int) -> float:
    """Operations of a model's layers on one token that attends to `seen` tokens, itself included."""
    config = model.config
    scores_and_mix = 2 + relative_scores(config)
    attention = 2 * config.layers * config.heads * config.head_dim * seen * scores_and_mix
    return 2 * layer_weights(model) + attention


def layer_weights(model: Model) -> int:
    """Entries of the layers' matrices, which every token is multiplied with: N of the paper, counted and not
    estimated."""
    layers = jax.tree_util.tree_leaves_with_path(model.abstract_params()["backbone"]["layers"])
    return sum(leaf.size for path, leaf in layers if path[-1].key == "kernel")


def relative_scores(config: Any) -> int:
    """Products of queries or keys with relative positions that attention adds to that of queries with keys."""
    return sum(bool(getattr(config, name, False)) for name in ("content_to_position", "position_to_content"))
