"""Odd input of every kind: whatever a user gives is used, or refused with one line that says why.

A case fails on an error that `reason_of` cannot explain (a command would call it unexpected), on a message of more than
one line, if it takes longer than `SLOWEST` seconds, or if a file that is refused is altered. Without `FUZZ_CASES` there
are a few cases, the same ones every time; with it there are that many, of all kinds together and at random:

    FUZZ_CASES=1000 python -m pytest tests/fuzz
"""

import contextlib
import copy
import io
import itertools
import json
import math
import os
import signal
import tempfile
import time
import warnings
from dataclasses import asdict
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pargs_jax.commands.command_line import parse
from pargs_jax.commands.generate import settings_of
from pargs_jax.commands.process import reason_of
from pargs_jax.config import DecodeConfig, TrainConfig
from pargs_jax.config_files import to_yaml
from pargs_jax.data.examples import tokenise
from pargs_jax.data.preferences import load_preferences, load_prompts
from pargs_jax.decoding.methods import METHODS
from pargs_jax.errors import InputError
from pargs_jax.evaluation.answers import load_systems
from pargs_jax.evaluation.config import EvaluateConfig
from pargs_jax.generation.answers import Answer
from pargs_jax.generation.output import AnswersFile
from pargs_jax.generation.traces import read_traces
from pargs_jax.mesh import parse_mesh
from pargs_jax.models.families import FAMILIES
from pargs_jax.models.hf import describe_model, load_model, save_model, stored_head
from pargs_jax.options import options
from pargs_jax.testing import TINY_CONFIGS, tiny_model, tiny_tokenizer
from pargs_jax.text.prompts import get_form
from pargs_jax.text.tokenization import TextTokenizer
from pargs_jax.training.checkpoint import Checkpoints
from pargs_jax.training.metrics_log import MetricsFile
from pargs_jax.training.run_folder import claimed_folder, save_config
from pargs_jax.training.same_run import check_same_data
from pargs_jax.training.step import TrainState
from tests.fuzz.odd import NUMBERS, TEXTS, damaged

SLOWEST = 30
SHARES = {"words": 0.25, "yaml": 0.15, "rows": 0.18, "model": 0.12, "tokenizer": 0.05, "answers": 0.13, "run": 0.1}
"""How the cases are divided; the rest are of checkpoints, which take longest."""
CASES = int(os.environ.get("FUZZ_CASES", 200))


def cases(share):
    """Runs a test on its share of the cases."""
    return settings(
        max_examples=max(1, math.ceil(share * CASES)),
        derandomize="FUZZ_CASES" not in os.environ,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def used_or_refused(call):
    """Calls it; returns whether it refused, and says what was wrong with how it did."""
    began = time.monotonic()

    def too_slow(*_):
        raise AssertionError(f"took longer than {SLOWEST} seconds")

    before = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(SLOWEST)
    refused = False
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except SystemExit as end:
        assert end.code == 0  # --help
    except AssertionError:
        raise
    except Exception as error:
        reason = reason_of(error)
        if reason is None:
            raise
        assert reason.strip() and (not isinstance(error, InputError) or "\n" not in reason.strip())
        refused = True
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < SLOWEST  # where the signal's error was lost, as in a callback
    return refused


def refuses_unaltered(path, call):
    """As `used_or_refused`; a file that is refused stays as it is."""
    before = path.read_bytes()
    if used_or_refused(call):
        assert path.read_bytes() == before


SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(TEXTS, SCALARS, max_size=3),
    st.sampled_from([[[]], [{}], {"a": {"b": []}}, [{"role": "user", "content": "Hi"}], [{"role": "user"}]]),
)


@st.composite
def altered(draw, mapping):
    """A mapping with some values replaced, removed or added, at any depth."""
    mapping = copy.deepcopy(mapping)
    for _ in range(draw(st.integers(1, 2))):
        place = mapping
        while True:
            name = draw(st.one_of(st.sampled_from(sorted(place)), TEXTS)) if place else draw(TEXTS)
            if isinstance(place.get(name), dict) and draw(st.booleans()):
                place = place[name]
                continue
            if draw(st.integers(0, 4)):
                place[name] = draw(VALUES)
            else:
                place.pop(name, None)
            break
    return mapping


CONFIGS = {"train.py": TrainConfig, "decode.py": DecodeConfig, "evaluate.py": EvaluateConfig}


def read_words(prog, words):
    config = parse(CONFIGS[prog], words, prog=prog, description="")
    parse_mesh(config.mesh)
    if prog == "decode.py" and config.method is not None:
        settings_of(config, METHODS[config.method])


@st.composite
def command_lines(draw):
    prog = draw(st.sampled_from(list(CONFIGS)))
    flags = [known.flag for known in options(CONFIGS[prog])]
    words = []
    for _ in range(draw(st.integers(1, 4))):
        words.append(draw(st.one_of(st.sampled_from(flags), st.text("-abcx_.=", max_size=12))))
        values = st.one_of(TEXTS, NUMBERS.map(lambda number: f"{number}"[:400]), st.sampled_from(list(METHODS)))
        words += draw(st.lists(values, max_size=2))
    return prog, words


@cases(SHARES["words"])
@given(command_lines())
def test_command_lines(case):
    used_or_refused(lambda: read_words(*case))


@st.composite
def yaml_files(draw):
    prog = draw(st.sampled_from(list(CONFIGS)))
    config = CONFIGS[prog]() if prog != "evaluate.py" else EvaluateConfig(answers=("a.jsonl",))
    if draw(st.booleans()):
        return prog, draw(damaged(to_yaml(config).encode()))
    text = yaml.dump(draw(altered(asdict(config))), allow_unicode=draw(st.booleans()))
    return prog, text.encode(errors="surrogatepass")


@cases(SHARES["yaml"])
@given(yaml_files())
def test_yaml_files(tmp_path_factory, case):
    prog, content = case
    file = folder_of(tmp_path_factory) / "c.yaml"
    file.write_bytes(content)
    refuses_unaltered(file, lambda: read_words(prog, ["--config", str(file)]))


ROWS = [
    {"id": "a", "prompt": "Why?", "chosen": " So.", "rejected": " No."},
    {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
    {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "Hello"}],
     "rejected": [{"role": "assistant", "content": "No"}]},
    {"prompt": "Why?", "response": "So.", "reward": 0.5, "split": "train"},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "labels": [0.0, 1.0], "weights": [1.0], "preference": [1.0]},
    {"history": "Why?", "human_ref_A": "So.", "human_ref_B": "No.", "labels": 1},
    {"question": {"full_text": "Why?"}, "answer_0": "So.", "answer_1": "No.", "score_0": 0.5, "score_1": -0.5},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
]  # fmt: skip


@st.composite
def row_files(draw):
    ending = draw(st.sampled_from([".jsonl", ".json", ".csv", ".txt", ".jsonl.gz", ".parquet"]))
    rows = draw(st.lists(st.one_of(*map(altered, ROWS), st.sampled_from(ROWS), VALUES), min_size=1, max_size=3))
    if ending == ".json":
        text = json.dumps(rows)
    elif ending == ".csv":
        text = "prompt,chosen,rejected\n" + "".join(f"{json.dumps(row)},b,c\n" for row in rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    content = text.encode(errors="surrogatepass")
    return ending, draw(damaged(content)) if draw(st.booleans()) else content


@cases(SHARES["rows"])
@given(row_files(), st.sampled_from(["plain", "hh", "shp", "chat"]), st.integers(0, 4))
def test_rows_and_prompts(tmp_path_factory, case, form, reader):
    ending, content = case
    file = folder_of(tmp_path_factory) / f"rows{ending}"
    file.write_bytes(content)
    how = [{}, {"require_rejected": False}, {"reward_range": (0.0, 1.0), "require_rejected": False}, {"labels": 2}]

    def read():
        if reader == len(how):
            load_prompts(file, get_form(form), tokenizer())
            return
        rows = load_preferences(file, get_form(form), tokenizer=tokenizer(), **how[reader]).rows
        answers = 1 if "require_rejected" in how[reader] else 2
        tokenise(rows, tokenizer(), 24, answers)

    refuses_unaltered(file, read)


@cases(SHARES["model"])
@given(st.data(), st.sampled_from(sorted(TINY_CONFIGS)))
def test_model_folders(tmp_path_factory, data, family):
    folder = folder_of(tmp_path_factory)
    for name, content in model_files(family).items():
        (folder / name).write_bytes(content)
    fields = json.loads(model_files(family)["config.json"])
    which = data.draw(
        st.sampled_from(["fields", "fields", "config.json", "model.safetensors", "generation_config.json"])
    )
    if which == "fields":
        known = FAMILIES[fields["model_type"]].config.HF_FIELDS
        names = st.sampled_from([*known.sizes, *known.names.values(), *known.read, *known.must])
        one = st.builds(lambda name, value: fields | {name: value}, names, VALUES)
        (folder / "config.json").write_text(json.dumps(data.draw(st.one_of(one, altered(fields)))))
    else:
        content = model_files(family).get(which, b'{"eos_token_id": [1, 2]}')
        # Most of the weights is numbers, all of which are fine; the header is what can be wrong.
        (folder / which).write_bytes(data.draw(damaged(content[:400])) + content[400:])

    def read():
        stored_head(folder)
        model = describe_model(folder, "vocabulary")
        if model.config.vocab_size * model.config.width < 1e6:
            load_model(folder, "vocabulary")

    used_or_refused(read)


@cases(SHARES["tokenizer"])
@given(st.data())
def test_tokenizer_folders(tmp_path_factory, data):
    folder = folder_of(tmp_path_factory)
    files = tokenizer_files()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if data.draw(st.booleans()):
        settings = json.loads(files["tokenizer_config.json"])
        (folder / "tokenizer_config.json").write_text(json.dumps(data.draw(altered(settings))))
    else:
        name = data.draw(st.sampled_from(sorted(files)))
        (folder / name).write_bytes(data.draw(damaged(files[name])))

    def read():
        loaded = TextTokenizer.load(folder)
        loaded.decode_answer(loaded.encode_prompt("Hi there"), loaded.encode_answer(" ok", starts_text=False))

    used_or_refused(read)


@cases(SHARES["answers"])
@given(st.data())
def test_answers_files(tmp_path_factory, data):
    folder = folder_of(tmp_path_factory)
    file, config = folder / "answers.jsonl", DecodeConfig(lm="lm", method="greedy", prompts="p.jsonl")
    with AnswersFile(file, config) as answers:
        answers.write([Answer(f"p{i}", "prompt", "fine", "stop", -1.0, 0.0, (), 3, 0.5) for i in range(2)])
    beside = folder / "answers.jsonl.config.yaml"
    which = data.draw(st.sampled_from([file, file, beside]))
    if which is file and data.draw(st.booleans()):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows[0] = data.draw(altered(rows[0]))
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        which.write_bytes(data.draw(damaged(which.read_bytes())))
    used_or_refused(lambda: load_systems([("", str(file))]))
    used_or_refused(lambda: list(read_traces(file)))
    refuses_unaltered(file, lambda: AnswersFile(file, config).__exit__())


@cases(SHARES["run"])
@given(st.data())
def test_run_folders(tmp_path_factory, data):
    folder = folder_of(tmp_path_factory)
    config = TrainConfig(out=str(folder), resume=True)
    save_config(config, folder)
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": i, "split": "train", "loss": 0.5}) + "\n" for i in range(3)))
    check_same_data(folder, "demo", [], resumes=False)
    which = data.draw(st.sampled_from(["config.yaml", "metrics.jsonl", "data.json"]))
    (folder / which).write_bytes(data.draw(damaged((folder / which).read_bytes())))

    def resume():
        with claimed_folder(config):
            check_same_data(folder, "demo", [], resumes=True)

    refuses_unaltered(folder / which, resume)
    used_or_refused(lambda: MetricsFile(metrics, 1).write(2, "train", {"loss": 0.25}))


@cases(1 - sum(SHARES.values()) if "FUZZ_CASES" in os.environ else 2 / CASES)
@given(st.data())
def test_checkpoints(tmp_path_factory, data):
    folder = folder_of(tmp_path_factory)
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state_of(step))
    files = [path for path in sorted((folder / "2").rglob("*")) if path.is_file()]
    for file in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=2)):
        content = file.read_bytes()
        file.write_bytes(data.draw(damaged(content[:2000])) + content[2000:])

    def restore():
        with Checkpoints(folder, keep=2) as checkpoints:
            state = checkpoints.restore(state_of(0), lambda line: None)
        step = int(state.step)  # another value than was saved would be the worst outcome
        assert step in (1, 2) and (state.params["w"] == state_of(step).params["w"]).all()

    used_or_refused(restore)


_numbers = itertools.count()


def folder_of(tmp_path_factory):
    """A new folder for one case."""
    folder = tmp_path_factory.getbasetemp() / "fuzz" / str(next(_numbers))
    folder.mkdir(parents=True)
    return folder


def state_of(step):
    return TrainState({"w": jnp.arange(50.0) * (step + 1)}, ({"moment": jnp.ones(3)},), jnp.int32(step))


@cache
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module", autouse=True)
def transformers_is_quiet():
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    yield
    transformers.logging.set_verbosity(level)


@cache
def model_files(family):
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, *tiny_model(family, "vocabulary", vocab_size=61), special_tokens={"eos_token_id": 2})
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@cache
def tokenizer_files():
    with tempfile.TemporaryDirectory() as folder:
        tiny_tokenizer().save(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
