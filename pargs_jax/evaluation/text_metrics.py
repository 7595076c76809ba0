"""What can be said of answers from their words alone: n-grams, repetition, diversity, and ROUGE.

Words are runs of letters and digits in lower case, as in the published ROUGE without its stemmer, in any alphabet.
"""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.lower())


def ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each run of n words occurs."""
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def repetition(text: str, n: int = 4) -> float | None:
    """The share of n-grams that occurred before in the text (rep-n, Welleck et al., 2020); None if there are none."""
    counts = ngrams(words(text), n)
    return 1 - len(counts) / counts.total() if counts else None


def args_diversity(text: str) -> float | None:
    """`prod_{n=2..4} unique n-grams / n-grams` of one answer (ARGS, Khanov et al., 2024, section 3.1; Su et al., 2022);
    None for an answer of fewer than four words."""
    shares = [repetition(text, n) for n in (2, 3, 4)]
    return None if None in shares else float(np.prod([1 - share for share in shares]))


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Different n-grams over words, in all samples of a prompt together (distinct-n, Li et al., 2016); None where there
    are no words. It falls as there are more words: compare equally many samples."""
    tokens = [words(text) for text in texts]
    total = sum(map(len, tokens))
    return len(set().union(*(ngrams(sample, n) for sample in tokens))) / total if total else None


def rouge_between_samples(texts: Sequence[str]) -> float | None:
    """The mean ROUGE-L of all pairs of samples of a prompt, 1 where all are alike; None for a single sample."""
    tokens = [words(text) for text in texts]
    pairs = [_f_measure(longest_common_subsequence(a, b), len(a), len(b)) for a, b in combinations(tokens, 2)]
    return float(np.mean(pairs)) if pairs else None


def rouge_n(answer: str, reference: str, n: int) -> float:
    """ROUGE-N (Lin, 2004): the F-measure of the n-grams that answer and reference share."""
    found, wanted = ngrams(words(answer), n), ngrams(words(reference), n)
    return _f_measure((found & wanted).total(), found.total(), wanted.total())


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L (Lin, 2004): the F-measure of the longest common subsequence of words."""
    found, wanted = words(answer), words(reference)
    return _f_measure(longest_common_subsequence(found, wanted), len(found), len(wanted))


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest sequence that both have, not necessarily in one piece.

    A row of the table is one whole number, a bit for each word of `first` (Hyyrö, 2004): 500 words take well under a
    millisecond.
    """
    places: dict[str, int] = {}
    for i, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << i
    everywhere = (1 << len(first)) - 1
    row = everywhere
    for word in second:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & everywhere
    return len(first) - row.bit_count()


def _f_measure(shared: int, found: int, wanted: int) -> float:
    return 2 * shared / (found + wanted) if shared else 0.0
