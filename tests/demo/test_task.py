"""The demo task: the oracle's order on hand-written answers, the splits, the labels and the tokenizer."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from pargs_jax.demo import language
from pargs_jax.demo import task as demo
from pargs_jax.demo.task import oracle, oracle_terms
from pargs_jax.errors import InputError

PROMPT = "Customer: Hi, this is Maria. My kettle arrived broken. What can I do?\nAgent:"
BEST = (
    " I am glad to hear from you, Maria. I gladly looked up your lovely kettle order. We will kindly send you a great"
    " new kettle. You are a kind customer of our lovely team. Have a great day, Maria."
)
PLAIN = (
    " I read your new note, Maria. I now found the blue kettle that you bought. We will now send you a blue new kettle."
    " Our small team thinks of you as a usual guest. I wish you a quiet week, Maria."
)
RUDE = (
    " I am sick to hear from you, Maria. I barely looked up your nasty kettle order. We will rudely send you an awful"
    " new kettle. You are a stupid customer of our nasty team. Have a nasty day, Maria."
)


def test_the_oracle_ranks_hand_written_answers() -> None:
    assert oracle(PROMPT, BEST) == 8.0
    assert oracle(PROMPT, PLAIN) == 0.0
    # "an awful" is not one of the task's sentences, which say "a awful": the sentence and its two words are lost.
    assert oracle(PROMPT, RUDE) == -6.0 - 2.0 - 1.0
    assert oracle(PROMPT, "") == oracle(PROMPT, " \n") == -5.0


@pytest.mark.parametrize(
    ("said", "instead", "changes"),
    [
        ("great new kettle", "great new lamp", {"wrong": -1.0}),
        ("from you, Maria", "from you, Tom", {"wrong": -1.0}),
        ("am glad", "am ready", {"kind": -1.0}),
        ("am glad", "am tired", {"kind": -1.0, "rude": -1.0}),
        ("Have a great day, Maria.", "Have a great day, Maria", {"kind": -1.0, "unknown": -2.0, "missing": -1.0}),
        ("Have a great", "Have great a", {"kind": -1.0, "unknown": -2.0, "missing": -1.0}),
        (" Have a great day, Maria.", "", {"kind": -1.0, "missing": -1.0}),
        ("Have a", "I wish you a lovely week, Maria. Have a", {"repeated": -2.0}),
        ("lovely kettle", "lovely lovely kettle", {"kind": -2.0, "unknown": -2.0, "missing": -1.0}),
    ],
)
def test_each_fault_changes_its_own_terms(said: str, instead: str, changes: dict[str, float]) -> None:
    assert said in BEST
    before, after = oracle_terms(PROMPT, BEST), oracle_terms(PROMPT, BEST.replace(said, instead))
    assert {
        term: pytest.approx(after[term] - before[term]) for term in before if after[term] != before[term]
    } == changes


def test_no_row_of_sentences_beats_the_best_answer() -> None:
    rng = random.Random(0)
    sentences = [
        language.fill(
            template,
            {"name": "Maria", "product": "kettle"}
            | {name: choice.kind[0] for name, choice in language.CHOICES.items()},
        )
        for templates in language.PARTS.values()
        for template in templates
    ]
    assert max(oracle(PROMPT, " ".join(rng.choices(sentences, k=rng.randint(1, 8)))) for _ in range(2000)) <= 8.0


def test_the_frontier_is_that_of_the_exchanges() -> None:
    """Reweighting drawn answers by exp(oracle / beta) gives the same rewards and KL as the closed form."""
    rewards = np.array([oracle(row.prompt, row.answer) for row in demo.exchanges(20_000)])
    for beta, (kl, mean) in zip((8.0, 2.0), demo.frontier([8.0, 2.0]), strict=True):
        weights = np.exp(rewards / beta)
        expected = (weights * rewards).mean() / weights.mean()
        assert mean == pytest.approx(expected, abs=0.1)
        # KL(q || p) = E_q[reward] / beta - log E_p[exp(reward / beta)]
        assert kl == pytest.approx(expected / beta - np.log(weights.mean()), abs=0.03)


def test_every_prompt_is_understood() -> None:
    numbered = [prompt for split in demo.SPLITS for prompt in demo._prompts_by_split()[split]]
    assert len({drawn.prompt for drawn in numbered}) == len({drawn.id for drawn in numbered}) == 65_536
    for drawn in numbered[::500]:
        assert language.parse_prompt(drawn.prompt) == drawn.request


def test_a_prompt_of_another_task_is_refused_in_one_line() -> None:
    for prompt in ("Hello", PROMPT.replace("Maria", "Zoe"), PROMPT.replace("kettle", "unicorn"), PROMPT + " Hi."):
        with pytest.raises(InputError, match="not a prompt of the demo task") as error:
            oracle(prompt, BEST)
        assert "\n" not in str(error.value)


def test_splits_share_no_prompt_and_rows_are_deterministic() -> None:
    by_split = {split: {row["prompt"] for row in demo.prompts(2_000, split=split)} for split in demo.SPLITS}
    assert all(len(prompts) == 2_000 for prompts in by_split.values())
    assert len(set.union(*by_split.values())) == 6_000
    assert demo.preferences(50, seed=3) == demo.preferences(50, seed=3) != demo.preferences(50, seed=4)
    assert demo.sft_rows(1)[0] == {
        "id": "demo-036655",
        "prompt": "Customer: Hi, this is Leo. My watch stopped working. What now?\nAgent:",
        "chosen": " I am ready to hear from you, Leo. I now found the stupid watch that you bought. We will now repair"
        " your stupid watch. Our stupid team thinks of you as a great guest. Have a quiet day, Leo.",
    }


def test_the_population_is_mediocre_and_labels_are_noisy() -> None:
    population = np.array([oracle(row.prompt, row.answer) for row in demo.exchanges(3_000)])
    assert -0.6 < population.mean() < -0.2 and 2 < population.std() < 2.5 and population.max() < 8
    margins = _margins(demo.preferences(3_000))
    assert 0.05 < (margins < 0).mean() < 0.1
    assert (margins > 0).mean() > 0.7
    assert (_margins(demo.preferences(1_000, temperature=1e-9)) >= 0).all()


def _margins(rows: list[dict[str, str]]) -> np.ndarray:
    assert all(row["chosen"] != row["rejected"] for row in rows)
    return np.array([oracle(row["prompt"], row["chosen"]) - oracle(row["prompt"], row["rejected"]) for row in rows])


@pytest.mark.parametrize(
    "ask",
    [
        lambda: demo.prompts(1, split="dev"),
        lambda: demo.prompts(10**6),
        lambda: demo.prompts(-1),
        lambda: demo.preferences(1, temperature=0.0),
    ],
)
def test_impossible_requests_are_input_errors(ask) -> None:
    with pytest.raises(InputError, match="demo task: "):
        ask()


def _sentencepiece(folder: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_the_shipped_tokenizer_round_trips_and_agrees_with_sentencepiece() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.DEMO_LM)
    reference = _sentencepiece(demo.DEMO_LM)
    assert len(tokenizer) == 640 and (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    totals = []
    for row in demo.exchanges(300, split="test"):
        prompt_ids, answer_ids = (tokenizer.encode(t, add_special_tokens=False) for t in (row.prompt, row.answer))
        assert prompt_ids + answer_ids == reference.encode(row.prompt + row.answer)
        assert tokenizer.decode(prompt_ids) == row.prompt and tokenizer.decode(answer_ids) == row.answer
        totals.append(len(prompt_ids) + len(answer_ids))
    assert max(totals) <= 86
    assert all(len(reference.encode(f" {word}")) == 1 for word in language.NAMES + language.PRODUCTS)
    assert tokenizer.decode(tokenizer.encode(" déjà ☃\n", add_special_tokens=False)) == " déjà ☃\n"


def test_the_tokenizer_command_makes_a_tokenizer_like_the_shipped_one_and_keeps_what_is_there(tmp_path, capsys) -> None:
    assert demo.main(["--tokenizer", str(tmp_path)]) == 0
    shipped, made = (_sentencepiece(folder) for folder in (demo.DEMO_LM, tmp_path))
    specials_and_bytes = range(259)
    assert len(made) == len(shipped)
    assert [made.id_to_piece(i) for i in specials_and_bytes] == [shipped.id_to_piece(i) for i in specials_and_bytes]
    for exchange in demo.exchanges(20):
        assert made.decode(made.encode(exchange.answer)) == exchange.answer
    configs = [json.loads((folder / "tokenizer_config.json").read_text()) for folder in (demo.DEMO_LM, tmp_path)]
    assert configs[0] == configs[1]
    assert demo.main(["--tokenizer", str(tmp_path)]) == 2
    assert "tokenizer.model exists" in capsys.readouterr().err


def test_the_write_command_writes_every_split_once(tmp_path, capsys) -> None:
    assert demo.main(["--write", str(tmp_path), "--pairs", "30"]) == 0
    rows = {split: (tmp_path / f"{split}.jsonl").read_text().splitlines() for split in demo.SPLITS}
    assert {split: len(lines) for split, lines in rows.items()} == {"train": 30, "eval": 3, "test": 3}
    assert set(json.loads(rows["train"][0])) == {"id", "prompt", "chosen", "rejected"}
    assert demo.main(["--write", str(tmp_path)]) == 2
    assert "train.jsonl exists" in capsys.readouterr().err
