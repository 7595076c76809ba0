"""Traces with made-up numbers, whose parts fit together as a decode's do."""

import numpy as np
import pytest

from pargs_jax.generation.traces import AnswerTrace, TracedCandidate, TracedToken

END = 2
"""The end-of-sequence token."""


def log_softmax(scores):
    return scores - np.log(np.exp(scores).sum())


@pytest.fixture(scope="session")
def make_trace():
    """Makes the trace of an answer whose tokens have the given texts, the end-of-sequence token behind them.

    Candidate c of step t has the id 100 * t + c + 10 and the drawn token is candidate 0 or, with `drawn`, another.
    """

    def make(texts, *, seed=0, weights=(2.0,), k=4, keeps_candidates=True, drawn=(), adds_up=False, **changes):
        rng = np.random.default_rng(seed)
        guides = len(weights)
        tokens = []
        for t, text in enumerate([*texts, ""]):
            log_p = log_softmax(rng.normal(size=k) * 2) + np.log(0.9)
            rewards = rng.normal(size=(k, guides)).round(3)
            log_q = log_softmax(log_p + rewards @ np.asarray(weights, float))
            index = drawn[t] if t < len(drawn) else 0
            is_end = t == len(texts)
            candidates = tuple(
                TracedCandidate(
                    END if is_end and c == index else 100 * t + c + 10,
                    text if c == index else f" other{c}",
                    float(log_p[c]),
                    float(log_q[c]),
                    tuple(map(float, rewards[c])),
                )
                for c in range(k)
            )
            chosen = candidates[index]
            kl = float((np.exp(log_q) * (log_q - log_p)).sum())
            entropy = float(rng.uniform(0, 3))
            kept = candidates if keeps_candidates else None
            tokens.append(TracedToken(chosen.id, text, chosen.log_p, chosen.log_q, chosen.rewards, entropy, kl, kept))
        rewards = np.array([token.rewards for token in tokens])
        fields = {
            "id": "a",
            "sample": 0,
            "prompt": "Tell me a story.",
            "response": "".join(texts),
            "finish_reason": "stop",
            "log_probability": sum(token.log_p for token in tokens),
            "kl": sum(token.kl for token in tokens),
            "guide_rewards": tuple(map(float, rewards.sum(axis=0) if adds_up else rewards[-1])),
            "method": "pargs",
            "weights": weights,
            "k": k,
            "temperature": 1.0,
            "seed": 0,
            "lm": "models/lm",
            "reward_models": tuple(f"runs/rm{j}/model" for j in range(guides)),
            "eos_ids": (END,),
            "tokens": tuple(tokens),
        }
        return AnswerTrace(**fields | changes)

    return make
