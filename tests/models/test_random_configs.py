"""Random checkpoints of all families give transformers' logits or rewards in torch, or are refused in one line."""

import collections
import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from random_configs import ABSENT, FIELDS, Case, draw

from pargs_jax.errors import InputError
from pargs_jax.models.hf import describe_model, load_model
from pargs_jax.models.tables import FAMILIES

LENGTH = 8
STARTS = np.array([3, 0])  # left padding; the shorter text first, since torch's dynamic RoPE remembers longer ones
PROMPT = 5


def checkpoint(case: Case, folder: Path) -> Any:
    """Writes the case's checkpoint and reads it again with transformers: the model in torch."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    kinds = {"vocabulary": "AutoModelForCausalLM", "reward": "AutoModelForSequenceClassification"}
    auto = getattr(transformers, kinds[case.head])
    torch.manual_seed(case.number)
    model = auto.from_config(transformers.AutoConfig.for_model(**json.loads(json.dumps(case.config))))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="4KB" if case.is_sharded else "5GB")
    single = folder / "model.safetensors"
    if single.exists() and case.head == "vocabulary" and case.head_stored != "as transformers does":
        tensors = load_file(single)
        embed = next(name for name in tensors if name.endswith(("wte.weight", "embed_tokens.weight")))
        tensors["lm_head.weight"] = tensors[embed].clone()
        if case.head_stored == "another":
            tensors["lm_head.weight"] += 0.1
        if case.head_stored == "alone" and model.config.tie_word_embeddings:
            del tensors[embed]
        save_file(tensors, single, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(case.config))
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def torch_outputs(case: Case, model: Any, tokens: np.ndarray) -> list[np.ndarray]:
    """Logits, or rewards of every prefix, or an encoder's reward, of each row without its padding."""
    import torch

    outputs = []
    with torch.inference_mode():
        for row, start in zip(tokens, STARTS, strict=True):
            ids = torch.tensor(row[None, start:])
            if case.head == "vocabulary":
                outputs.append(model(ids).logits[0].numpy())
            elif case.config["model_type"] == "deberta-v2":
                segments = torch.arange(start, LENGTH)[None] >= PROMPT
                outputs.append(model(ids, token_type_ids=segments.long()).logits[0, 0].numpy())
            else:
                outputs.append(model.score(model.base_model(ids).last_hidden_state)[0, :, 0].numpy())
    return outputs


def jax_outputs(case: Case, folder: Path, tokens: np.ndarray) -> list[np.ndarray]:
    model, params, new_head, *_ = load_model(folder, case.head)
    assert not new_head
    if case.config["model_type"] == "deberta-v2":
        ends = np.full(len(STARTS), LENGTH)
        return list(np.asarray(model.text_rewards(params, tokens, STARTS, ends, prompt_width=PROMPT)))
    hidden = model.encode(params, tokens, STARTS)
    read = model.logits if case.head == "vocabulary" else model.rewards
    return [row[start:] for row, start in zip(np.asarray(read(params, hidden)), STARTS, strict=True)]


def examine(case: Case, folder: Path) -> str:
    """ "compared" or "refused"; anything else that may happen is raised."""
    tokens = np.random.default_rng(case.number).integers(0, 11, (len(STARTS), LENGTH))
    expected, error = None, None
    try:
        expected = torch_outputs(case, checkpoint(case, folder), tokens)
    except Exception as raised:
        error = raised
    try:
        if error is not None and not (folder / "config.json").exists():
            (folder / "config.json").write_text(json.dumps(case.config))
            describe_model(folder, case.head)
        else:
            ours = jax_outputs(case, folder, tokens)
            if error is None:
                for mine, theirs in zip(ours, expected, strict=True):
                    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)
                return "compared"
    except InputError as refusal:
        assert "\n" not in str(refusal)
        return "refused"
    raise AssertionError(f"transformers cannot use it ({error!r}) and it is read without a word")


def run(seed: int, count: int) -> tuple[collections.Counter, list[str], dict[str, dict[str, set[str]]]]:
    """How many cases came to what, those that went wrong, and the values that each field had in those compared."""
    ends: collections.Counter = collections.Counter()
    wrong: list[str] = []
    values: dict[str, dict[str, set[str]]] = {}
    # Compiling one of these models takes far longer than running it operation by operation: the shapes are few.
    with jax.disable_jit():
        for number in range(count):
            case = draw(seed, number)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    end = examine(case, Path(folder))
                except Exception:
                    end = "wrong"
                    wrong.append(f"seed {seed}, case {number}: {case}\n{traceback.format_exc(limit=-3)}")
                    print(wrong[-1], flush=True)
            ends[end] += 1
            for name, value in case.drawn.items():
                seen = values.setdefault(case.config["model_type"], {}).setdefault(name, set())
                if end == "compared":
                    seen.add("absent" if value is ABSENT else json.dumps(value))
    return ends, wrong, values


@pytest.mark.filterwarnings("ignore")
def test_random_configs_give_the_same_as_torch_or_are_refused():
    pytest.importorskip("torch", reason="the reference is transformers on torch")
    ends, wrong, values = run(0, 200)
    assert not wrong, "\n".join(wrong)
    assert ends["compared"] >= 120, ends
    for family, fields in FIELDS.items():
        known = FAMILIES[family].config.HF_FIELDS
        assert {*known.read, *known.sizes, *known.must} - values[family].keys() == set()
        varied = {name for name, choices in fields.items() if len(choices) > 1}
        assert {name for name in varied if len(values[family][name]) < 2} == set()


if __name__ == "__main__":
    seed, count = map(int, sys.argv[1:])
    ends, *_ = run(seed, count)
    print(ends)
