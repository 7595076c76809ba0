"""The demo task: the oracle's order on hand-written answers, the splits, the labels and the tokenizer."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from pargs_jax.demo import language as demo_language
from pargs_jax.demo import task as demo
from pargs_jax.demo.task import oracle, oracle_terms
from pargs_jax.errors import InputError

PROMPT = "Customer: Hi, this is Maria. My kettle arrived broken. What can I do?\nAgent:"
IDEAL = (
    " Sorry to hear that, Maria. I looked up your kettle order. I will send you a new kettle today."
    " Have a nice day, Maria."
)
PLAIN = " I got your note, Maria. I looked up your order. We will see what we can do. That is all for now."
RUDE = (
    " Sorry to hear that, Maria, but it is your fault. I looked up your order. We will see what we can do."
    " Thank you for nothing."
)
GARBLED = " Sorry sorry Maria. Kettle kettle a new. I will send you send you. Thank kettle."


def test_the_oracle_ranks_hand_written_answers() -> None:
    rewards = [oracle(PROMPT, answer) for answer in (IDEAL, PLAIN, RUDE, GARBLED)]
    assert rewards == [4.5, 0.0, -3.0, -6.0]
    assert oracle(PROMPT, "") == oracle(PROMPT, " \n") == -3.0


@pytest.mark.parametrize(
    ("said", "instead", "changes"),
    [
        ("new kettle", "new lamp", {"remedy": -2.0, "wrong_product": -1.0}),
        ("hear that, Maria", "hear that, Tom", {"opening": -1.0, "wrong_name": -1.0}),
        (
            "I will send you a new kettle today.",
            "I will cancel your kettle order today.",
            {"remedy": -2.0, "wrong_remedy": -1.0},
        ),
        ("day, Maria.", "day somewhere else, Maria.", {"closing": -0.5, "rude": -1.5}),
        (
            "Sorry to hear that, Maria.",
            "Sorry to hear that, Maria, my cat is sad too.",
            {"opening": -1.0, "off_topic": -0.75},
        ),
        ("Have a nice day, Maria.", "Have a nice day, Maria", {"closing": -0.5, "unfinished": -1.5}),
        ("Have a nice", "Have nice a", {"closing": -0.5, "unknown": -1.5}),
        (" Have a nice day, Maria.", "", {"closing": -0.5}),
        ("Have", "It is sunny here today. My cat likes to eat fish. Have", {"off_topic": -1.5, "length": -0.5}),
    ],
)
def test_each_fault_changes_its_own_terms(said: str, instead: str, changes: dict[str, float]) -> None:
    assert said in IDEAL
    before, after = oracle_terms(PROMPT, IDEAL), oracle_terms(PROMPT, IDEAL.replace(said, instead))
    assert {
        term: pytest.approx(after[term] - before[term]) for term in before if after[term] != before[term]
    } == changes


def test_repetition_and_recombination_never_beat_the_ideal_answer() -> None:
    assert oracle(PROMPT, " Sorry to hear that, Maria." * 2) < oracle(PROMPT, " Sorry to hear that, Maria.")
    assert oracle(PROMPT, IDEAL + IDEAL) < oracle(PROMPT, IDEAL) == 4.5
    lines = [line.template.format(name="Maria", product="kettle") for line in demo_language.ANSWER_LINES]
    rng = random.Random(0)
    assert max(oracle(PROMPT, " ".join(rng.choices(lines, k=rng.randint(1, 8)))) for _ in range(2000)) <= 4.5


def test_every_prompt_is_understood_and_every_problem_has_one_best_answer() -> None:
    numbered = [prompt for split in demo.SPLITS for prompt in demo._prompts_by_split()[split]]
    assert len({drawn.prompt for drawn in numbered}) == len({drawn.id for drawn in numbered}) == 65_536
    for drawn in numbered[::500]:
        assert demo.parse_prompt(drawn.prompt) == drawn.request
        remedy = demo_language.REMEDIES[drawn.request.problem][0].format(product=drawn.request.product)
        answer = f" Thank you for writing, {drawn.request.name}. {remedy} Thank you for your patience."
        assert oracle(drawn.prompt, answer) == 4.5


def test_another_prompt_is_refused_in_one_line() -> None:
    for prompt in ("Hello", PROMPT.replace("Maria", "Zoe"), PROMPT.replace("kettle", "unicorn"), PROMPT + " Hi."):
        with pytest.raises(InputError, match="not a prompt of the demo task") as error:
            oracle(prompt, IDEAL)
        assert "\n" not in str(error.value)


def test_splits_share_no_prompt_and_rows_are_deterministic() -> None:
    by_split = {split: {row["prompt"] for row in demo.prompts(2_000, split=split)} for split in demo.SPLITS}
    assert all(len(prompts) == 2_000 for prompts in by_split.values())
    assert len(set.union(*by_split.values())) == 6_000
    assert demo.preferences(50, seed=3) == demo.preferences(50, seed=3) != demo.preferences(50, seed=4)
    assert demo.sft_rows(1)[0] == {
        "id": "demo-036655",
        "prompt": "Customer: Hi, this is Leo. My watch stopped working. What now?\nAgent:",
        "chosen": " Thank you for writing, Leo, I like notes. Your watch is not my problem. I will ask about your"
        " order. Have a nice day, Leo.",
    }


def test_the_population_is_mediocre_and_labels_are_noisy() -> None:
    population = np.array([oracle(row.prompt, row.answer) for row in demo.exchanges(3_000)])
    assert -1.5 < population.mean() < 0 and 2 < population.std() < 3 and population.max() == 4.5
    margins = _margins(demo.preferences(3_000))
    assert 0.07 < (margins < 0).mean() < 0.13
    assert (margins > 0).mean() > 0.85
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
    assert len(tokenizer) == 512 and (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    totals = []
    for row in demo.exchanges(300, split="test"):
        prompt_ids, answer_ids = (tokenizer.encode(t, add_special_tokens=False) for t in (row.prompt, row.answer))
        assert prompt_ids + answer_ids == reference.encode(row.prompt + row.answer)
        assert tokenizer.decode(prompt_ids) == row.prompt and tokenizer.decode(answer_ids) == row.answer
        totals.append(len(prompt_ids) + len(answer_ids))
    assert max(totals) <= 128
    assert all(len(reference.encode(f" {word}")) == 1 for word in demo_language.NAMES + demo_language.PRODUCTS)
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
