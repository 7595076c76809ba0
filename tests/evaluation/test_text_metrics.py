"""N-grams, diversity and ROUGE, against published numbers and brute force."""

from itertools import combinations

import numpy as np
import pytest

from pargs_jax.evaluation.text_metrics import (
    args_diversity,
    distinct,
    longest_common_subsequence,
    repetition,
    rouge_between_samples,
    rouge_l,
    rouge_n,
    words,
)


def test_rouge_is_that_of_the_published_package():
    """Numbers of rouge-score 0.1.2 without its stemmer; the first two texts are its own example."""
    first, second = "The quick brown fox jumps over the lazy dog", "The quick brown dog jumps on the log."
    assert rouge_n(second, first, 1) == pytest.approx(0.7058823529411765)
    assert rouge_n(second, first, 2) == pytest.approx(0.26666666666666666)
    assert rouge_l(second, first) == pytest.approx(0.5882352941176471)
    assert rouge_l("", first) == rouge_n("", first, 2) == rouge_n("one", "one", 2) == 0


def test_the_longest_common_subsequence_is_that_of_all_subsequences():
    rng = np.random.default_rng(0)

    def subsequences(text):
        return {chosen for n in range(len(text) + 1) for chosen in combinations(text, n)}

    for _ in range(30):
        first, second = (list(rng.choice(list("abc"), rng.integers(0, 9))) for _ in range(2))
        expected = max(map(len, subsequences(first) & subsequences(second)))
        assert longest_common_subsequence(first, second) == expected


def test_words_are_those_of_any_alphabet():
    assert words("Don't STOP_here, 42 мир日本!") == ["don", "t", "stop", "here", "42", "мир日本"]


def test_repetition_and_diversity_by_hand():
    text = "a b a b a b"  # 5 pairs (2 different), 4 triples (2), 3 fours (2)
    assert repetition(text, 2) == pytest.approx(3 / 5)
    assert repetition(text) == pytest.approx(1 / 3)
    assert args_diversity(text) == pytest.approx(2 / 5 * 2 / 4 * 2 / 3)
    assert args_diversity("one two three four") == 1 and args_diversity("one two three") is None
    assert repetition("one two") is None


def test_similarity_of_the_samples_of_a_prompt():
    assert distinct(["a b", "a c"], 1) == pytest.approx(3 / 4)
    assert distinct(["a b", "a b"], 2) == pytest.approx(1 / 4)
    assert distinct(["", "!"], 1) is None
    assert rouge_between_samples(["a b c"]) is None
    assert rouge_between_samples(["a b", "a b", "a c"]) == pytest.approx((1 + 0.5 + 0.5) / 3)
