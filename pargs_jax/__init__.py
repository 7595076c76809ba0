"""Reward-guided text generation in JAX: partial-sequence reward models (PARGS) and decoding with them.

Models are static, hashable descriptions; their arrays are plain dicts that travel beside them. So every function here
is pure, and the big ones are jitted already:

    import jax, jax.numpy as jnp
    import pargs_jax as pj

    lm = pj.load_model("meta-llama/Llama-2-7b-hf", "vocabulary", dtype="bfloat16")
    rm = pj.load_model("runs/partial_bt", "reward")          # same tokenizer; train.py makes these

    decoder = pj.Decoder(lm.model, (pj.CausalGuide(rm.model),), pj.TopK(10), pj.Sample(), eos_ids=lm.eos_ids)
    settings = pj.RowSettings.alike(                         # or each row's own: reward weights (the paper's beta), ...
        len(prompts), weights=[2.0], temperature=1.0, candidates=10, max_new_tokens=128
    )
    answers = pj.decode(
        decoder, lm.params, (rm.params,),
        prompts, lengths,                                    # Int[B P] left-padded, Int[B]
        pj.row_keys(0, jnp.arange(len(prompts))),            # a row's answer does not depend on its batch
        settings,
        128,
    )
    answers.tokens, answers.lengths, answers.trace.rewards   # Int[B N], Int[B], Float[B N J]

The losses are functions of arrays. With a reward model's rewards of every prefix, `Float[B 2 R]`, chosen first:

    outputs = rm.model.read_answers(rm.params, batch)        # one causal pass over both answers
    rewards = outputs.rewards()
    loss, metrics = pj.partial_bradley_terry(rewards, batch.answer_lengths)

`outputs.rewards_at(lengths)` gives those of some prefixes, of every kind of model: a `pj.EncoderModel` (DeBERTa) reads
each prefix apart. A reward model with another tokenizer scores the text: `pj.RewardModel.load(path, lm_tokenizer, ...)`
finds out, and makes the guide that it needs.

On a mesh, `with jax.set_mesh(pj.make_mesh("tpu-v4-8", "decode")):`, weights are loaded to where they belong, and all of
this runs on every device of it.

`pj.Session` goes from text to text, all at once (`answer`) or piece by piece (`stream`). `pargs_jax.testing` has tiny
models to try all this on, without any files.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pargs_jax.commands.train import train
    from pargs_jax.config import DecodeConfig, TrainConfig
    from pargs_jax.data.batches import Batch
    from pargs_jax.data.preferences import Prompt
    from pargs_jax.decoding.guides import (
        AutoregressiveGuide,
        CandidateGuide,
        Capacity,
        CausalGuide,
        Chosen,
        EncoderGuide,
        LookAheadGuide,
        NextTokenGuide,
        PreferenceGuide,
        PreferredPrompts,
        Prompts,
        RatioGuide,
        RetokenisedGuide,
        SimilarityGuide,
        Text,
        VocabularyGuide,
    )
    from pargs_jax.decoding.loop import Decoder, decode, row_keys
    from pargs_jax.decoding.methods import METHODS
    from pargs_jax.decoding.proposals import AllTokens, TopK, TopKOfSum, TopP
    from pargs_jax.decoding.rules import Contrastive, Greedy, Sample
    from pargs_jax.decoding.search import (
        BestOfN,
        Cards,
        ChunkBeam,
        Searcher,
        SearchInputs,
        SpeculativeRejection,
        TwistedSmc,
        best_of_n_curve,
        search,
    )
    from pargs_jax.decoding.state import RowSettings, insert, take
    from pargs_jax.errors import InputError
    from pargs_jax.evaluation.cost import step_operations
    from pargs_jax.generation.answers import Answer
    from pargs_jax.generation.plan import Settings
    from pargs_jax.generation.reward_models import RewardModel
    from pargs_jax.generation.session import Piece, Session
    from pargs_jax.generation.traces import AnswerTrace, read_traces
    from pargs_jax.mesh import make_mesh
    from pargs_jax.models.causal import CausalModel
    from pargs_jax.models.encoder import EncoderModel
    from pargs_jax.models.hf import load_model, save_model
    from pargs_jax.models.model import unstack_layers
    from pargs_jax.models.prefix_causal import PrefixCausalModel
    from pargs_jax.objectives.bradley_terry import bradley_terry, partial_bradley_terry
    from pargs_jax.objectives.likelihood import answer_likelihood
    from pargs_jax.text.retokenisation import Retokeniser
    from pargs_jax.text.tokenization import TextTokenizer
    from pargs_jax.training.objective import Objective
    from pargs_jax.training.step import make_optimizer, make_train_step

# Where each public name lives. Loaded on first use, so that importing the package does not import JAX.
_HOMES = {
    "pargs_jax.config": "DecodeConfig TrainConfig",
    "pargs_jax.data.batches": "Batch",
    "pargs_jax.data.preferences": "Prompt",
    "pargs_jax.text.retokenisation": "Retokeniser",
    "pargs_jax.text.tokenization": "TextTokenizer",
    "pargs_jax.decoding.guides": (
        "AutoregressiveGuide CandidateGuide Capacity CausalGuide Chosen EncoderGuide LookAheadGuide "
        "NextTokenGuide PreferenceGuide PreferredPrompts Prompts RatioGuide RetokenisedGuide SimilarityGuide Text "
        "VocabularyGuide"
    ),
    "pargs_jax.decoding.loop": "Decoder decode row_keys",
    "pargs_jax.decoding.methods": "METHODS",
    "pargs_jax.decoding.proposals": "AllTokens TopK TopKOfSum TopP",
    "pargs_jax.decoding.rules": "Contrastive Greedy Sample",
    "pargs_jax.decoding.search": (
        "BestOfN Cards ChunkBeam SearchInputs Searcher SpeculativeRejection TwistedSmc best_of_n_curve search"
    ),
    "pargs_jax.decoding.state": "RowSettings insert take",
    "pargs_jax.errors": "InputError",
    "pargs_jax.evaluation.cost": "step_operations",
    "pargs_jax.generation.answers": "Answer",
    "pargs_jax.generation.plan": "Settings",
    "pargs_jax.generation.reward_models": "RewardModel",
    "pargs_jax.generation.session": "Piece Session",
    "pargs_jax.generation.traces": "AnswerTrace read_traces",
    "pargs_jax.mesh": "make_mesh",
    "pargs_jax.models.causal": "CausalModel",
    "pargs_jax.models.encoder": "EncoderModel",
    "pargs_jax.models.hf": "load_model save_model",
    "pargs_jax.models.model": "unstack_layers",
    "pargs_jax.models.prefix_causal": "PrefixCausalModel",
    "pargs_jax.objectives.bradley_terry": "bradley_terry partial_bradley_terry",
    "pargs_jax.objectives.likelihood": "answer_likelihood",
    "pargs_jax.commands.train": "train",
    "pargs_jax.training.objective": "Objective",
    "pargs_jax.training.step": "make_optimizer make_train_step",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'pargs_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
