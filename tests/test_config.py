"""Options: declared once, read from flags and YAML, checked with one line that says what would be right."""

import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import pytest
import yaml

from pargs_jax.commands.command_line import parse
from pargs_jax.config import DecodeConfig, MethodName, ObjectiveConfig, OptimConfig, TrainConfig
from pargs_jax.config_files import from_mapping, to_yaml
from pargs_jax.data_config import column_names
from pargs_jax.errors import InputError
from pargs_jax.names_elsewhere import ELSEWHERE
from pargs_jax.options import option, options


def train(*argv):
    return parse(TrainConfig, argv, prog="train.py", description="Trains.")


def decode(*argv):
    return parse(DecodeConfig, argv, prog="decode.py", description="Decodes.")


def message(read, *arguments):
    with pytest.raises(InputError) as caught:
        read(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    """Writes c.yaml in the current folder, so that messages begin with that short name."""
    monkeypatch.chdir(tmp_path)

    def write(text):
        Path("c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "c.yaml"

    return write


def test_flags_win_over_yaml_which_wins_over_defaults(config_file):
    file = config_file("seed: 1\nbatch_size: 32\noptim: {lr: 1e-4, warmup: 0}\nobjective:\n  # all left out\n")
    config = train("--config", file, "--batch-size", "8", "--optim.lr", "2e-5", "--objective.name", "bt")
    assert config == TrainConfig(
        seed=1, batch_size=8, optim=OptimConfig(lr=2e-5, warmup=0.0), objective=ObjectiveConfig(name="bt")
    )
    assert train("--config", config_file("")) == train() == TrainConfig()


def test_yaml_scalars_are_read_by_the_type_of_the_field(config_file):
    config = train("--config", config_file("optim: {lr: 1e-4}\nepochs: 2\nresume: true\nout: null\n"))
    assert (config.optim.lr, config.epochs, config.resume, config.out) == (1e-4, 2.0, True, None)
    assert isinstance(config.epochs, float)


def test_lists_come_as_several_words_or_repeated_flags(config_file):
    three = decode("--rm", "a", "--rm", "b", "c", "--weight", "-1", ".5", "2")
    assert (three.rm, three.weight) == (("a", "b", "c"), (-1.0, 0.5, 2.0))
    file = config_file("rm: [a, b]\nweight: 1\n")
    assert decode("--config", file).weight == (1.0,)
    assert decode("--config", file, "--rm", "c").rm == ("c",)


def test_null_on_the_command_line_unsets_an_option(config_file):
    file = config_file("steps: 10\nobjective: {sample: 4}\n")
    config = train("--config", file, "--steps", "none", "--objective.sample", "null")
    assert config.steps is None and config.objective.sample is None


def test_switches_and_spellings():
    assert train("--model.from_scratch", "--batch_size=8").model.from_scratch
    assert not train("--resume", "--no-resume").resume
    assert decode("--prompt=--batch_size=3").prompt == "--batch_size=3"  # values keep their underscores
    assert decode("--prompt", "").prompt == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim: {lrr: 1}", "c.yaml: optim.lrr: unknown key, got 1; did you mean 'lr' under 'optim'?"),
        ("lr: 1", "c.yaml: lr: unknown key, got 1; did you mean 'lr' under 'optim'?"),
        ("optim.lr: 1", "c.yaml: optim.lr: unknown key, got 1; did you mean 'lr' under 'optim'?"),
        ("batchsize: 1", "c.yaml: batchsize: unknown key, got 1; did you mean 'batch_size'?"),
        ("qqqq: 1", "c.yaml: qqqq: unknown key, got 1; no option has a name like it"),
        ("optim: 3", "c.yaml: optim: got 3, must be a mapping of options"),
        ("optim: {lr: fast}", 'c.yaml: optim.lr: got "fast", must be a finite number, above 0'),
        ("optim: {lr: .inf}", "c.yaml: optim.lr: got Infinity, must be a finite number, above 0"),
        ("epochs: true", "c.yaml: epochs: got true, must be a finite number, above 0"),
        ("batch_size: 6.0", "c.yaml: batch_size: got 6.0, must be a whole number, at least 1 and at most 65536"),
        ("batch_size: true", "c.yaml: batch_size: got true, must be a whole number, at least 1 and at most 65536"),
        ("steps: '5'", 'c.yaml: steps: got "5", must be a whole number, at least 1, or null'),
        ("resume: 1", "c.yaml: resume: got 1, must be true or false"),
        ("out: 2024", "c.yaml: out: got 2024, must be non-empty text, or null"),
        ("mesh: null", "c.yaml: mesh: got null, must be non-empty text"),
        (
            "data: {format: hhh}",
            'c.yaml: data.format: got "hhh", must be one of hh, tldr, shp, saferlhf, chat, plain, or null',
        ),
        ("[seed]", "c.yaml: got [\"seed\"], must be a mapping of options, such as 'seed: 1'"),
        ("optim:\n  lr: 1\n  lr: 2", "c.yaml: line 3: not a valid config file (key lr is given twice)"),
        ("a: b: c", "c.yaml: line 1: not a valid config file (mapping values are not allowed here)"),
    ],
)
def test_a_mistake_in_yaml_is_one_line(config_file, text, expected):
    assert message(train, "--config", config_file(text)) == expected


def test_a_config_file_that_cannot_be_read(config_file):
    assert message(train, "--config", "no.yaml") == "no.yaml: cannot read the config file (No such file or directory)"
    assert message(train, "--config", config_file(b"\xff\xfe\x00")).startswith("c.yaml: not a valid config file (")
    assert message(train, "--config", config_file("out: 2024-13-45")).startswith("c.yaml: not a valid config file (")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--bach_size 3", "--bach_size: unknown option; did you mean --batch-size?"),
        ("--lr=3", "--lr: unknown option; did you mean --optim.lr?"),
        ("--zzzz", "--zzzz: unknown option; see --help"),
        ("stray", 'unexpected argument "stray"; options begin with -- (see --help)'),
        ("--batch 3", "--batch: unknown option; did you mean --batch-size?"),  # no silent abbreviations
        ("--seed", "--seed: expected one argument"),
        ("--seed x", '--seed: got "x", must be a whole number, at least 0 and at most 4294967295'),
        ("--steps 1.5", '--steps: got "1.5", must be a whole number, at least 1, or null'),
        ("--optim.lr nan", "--optim.lr: got NaN, must be a finite number, above 0"),
        ("--model.dropout 1", "--model.dropout: got 1.0, must be a finite number, at least 0 and below 1"),
        ("--model.init=", '--model.init: got "", must be non-empty text'),
        ("--dtype fp16", '--dtype: got "fp16", must be one of float32, bfloat16'),
        ("--optim.accumulation 3", "--batch-size: got 8, must be a multiple of --optim.accumulation (3)"),
        (
            "--objective.minimum-length 128",
            "objective.minimum-length: got 128, must be below max-length (128)",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(argv, expected):
    assert message(train, *argv.split()) == expected


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--prompt a --prompts b", "--prompt and --prompts: got both, give only one"),
        (
            "--rm a b --weight 1 2 3",
            "--weight: got 3 weights for 2 reward models (--rm), give one for all or one for each",
        ),
        ("--search.chunk 3", "--search.chunk: needs --method NAME, one that searches"),
        ("--weight 1 x", '--weight: got [1.0, "x"], must be a finite number, one or several'),
        ("--temperature 0", "--temperature: got 0.0, must be a finite number, above 0, or null"),
        ("--lm x", "--lm x: needs prompts to answer; give --prompt TEXT or --prompts FILE"),
        (
            "--lm x --prompt a",
            f"--lm x: needs --method NAME, one of {', '.join(get_args(MethodName))}",
        ),
        (
            "--lm x --prompt a --method args",
            "--method args: needs a reward model; give --rm PATH, or an unguided method "
            "(greedy, top_k, top_p, contrastive)",
        ),
    ],
)
def test_options_of_decoding_that_contradict_each_other(argv, expected):
    assert message(decode, *argv.split()) == expected


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            "--objective.name bt --objective.stride 2",
            "--objective.stride: got 2, but this is not an option of --objective.name bt; it belongs to partial_bt",
        ),
        (
            "--objective.name sft --objective.margin 0.5",
            "--objective.margin: got 0.5, but this is not an option of --objective.name sft; it belongs to bt and",
        ),
        ("--objective.name bt --objective.sample 4", "--objective.sample: got 4, but this is not an option"),
        (
            "--objective.name bt --objective.minimum-length 2",
            "--objective.minimum-length: got 2, but this is not an option",
        ),
        ("--objective.name sft --objective.prefix-weights linear", '--objective.prefix-weights: got "linear", but'),
        ("--objective.name sft --objective.centring 1", "--objective.centring: got 1.0, but this is not an option"),
        (
            "--steps 10 --epochs 2",
            "--steps and --epochs: got both (10 and 2), give only one (--steps null unsets the one in a config file)",
        ),
        (
            "--data.train f.jsonl --data.demo-pairs 64",
            "--data.demo-pairs: got 64, but the pairs come from --data.train f.jsonl; leave it out, or train on",
        ),
        ("--data.held-out 0.1", "--data.held-out: got 0.1, but the demo has held-out pairs of its own; leave one"),
        (
            "--data.train f.jsonl --data.eval g.jsonl --data.held-out 0.1",
            "--data.held-out: got 0.1, but --data.eval is g.jsonl; leave one of them out",
        ),
        ("--lora.alpha 16", "--lora.alpha: got 16.0, but --lora.rank is 0, so the whole model is trained; give a"),
        ("--lora.layers query", '--lora.layers: got "query", but --lora.rank is 0'),
        ("--lora.rank 4 --lora.layers (", '--lora.layers: "(" is not a regular expression ('),
        ("--objective.name parm --objective.layers (", 'objective.layers: "(" is not a regular expression ('),
        ("--objective.name ctl --objective.n 1", "objective.n: got 1, but ctl compares answers to a prompt; must be"),
        ("--objective.name ctl --best-metric accuracy", "--best-metric: got 'accuracy', but ctl has none; must be"),
        ("--objective.name distill", "objective.teacher: distill needs a reward model to learn from; give a folder"),
        (
            "--objective.name farma --objective.minimum-length 128",
            "objective.minimum-length: got 128, must be below max-length (128)",
        ),
        (
            "--objective.teacher runs/partial_bt",
            '--objective.teacher: got "runs/partial_bt", but this is not an option of --objective.name partial_bt; it',
        ),
    ],
)
def test_options_of_training_that_would_be_ignored(argv, expected):
    assert message(train, *argv.split()).startswith(expected)


@pytest.mark.parametrize(
    "argv",
    [
        "--objective.name bt --objective.chunk 4 --objective.stride 1 --objective.margin 1",
        "--objective.name sft --objective.chunk 4",
        "--objective.stride 2 --objective.sample 3 --objective.minimum-length 2 --objective.prefix-weights linear",
        "--steps 10 --epochs 1",
        "--lora.rank 4 --lora.alpha 16 --lora.layers query",
        "--config configs/demo_lm.yaml --steps null --epochs 2",
        "--config configs/demo_small_lm.yaml --epochs 2",
        "--config configs/hh.yaml --objective.name bt",
        "--config configs/hh_deberta.yaml --objective.name bt",
        "--config configs/paper_tldr.yaml --objective.name bt",
    ],
)
def test_options_of_training_that_go_together(argv, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    train(*argv.split())


def test_configs_made_in_python_are_checked_alike():
    config = replace(TrainConfig(), batch_size=10, optim=OptimConfig(accumulation=5))
    config.validate()
    assert message(replace(config, batch_size="64").validate) == (
        '--batch-size: got "64", must be a whole number, at least 1 and at most 65536'
    )
    assert message(DecodeConfig(rm="folder").validate) == '--rm: got "folder", must be non-empty text, one or several'
    DecodeConfig(lm="x", prompt="", method="greedy").validate()


def test_the_output_folder_is_named_after_the_objective():
    assert TrainConfig(objective=ObjectiveConfig(name="bt")).output_folder == Path("runs/bt")
    assert TrainConfig(out="there").output_folder == Path("there")


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(out="null", steps=3, resume=True, optim=OptimConfig(lr=1e-7, eps=1e-12)),
        DecodeConfig(rm=("a", "1"), weight=(0.5, 1e-4), prompt="\n\nHuman: né: #1?\n\nAssistant:"),
    ],
)
def test_the_saved_config_loads_back_equal(config):
    assert from_mapping(type(config), yaml.safe_load(to_yaml(config)), "run.yaml") == config
    assert from_mapping(type(config), asdict(config), "here") == config


def test_a_mapping_with_options_that_contradict_each_other_names_its_place():
    saved = {"optim": {"accumulation": 7}}
    assert message(from_mapping, TrainConfig, saved, "run.yaml") == (
        "run.yaml: --batch-size: got 8, must be a multiple of --optim.accumulation (7)"
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("question", 'got "question", must be NAME=COLUMN, with a NAME of id, prompt, '),
        ("prompt=", 'got "prompt=", must be NAME=COLUMN, with a NAME of id, prompt, '),
        ("=question", 'got "=question", must be NAME=COLUMN, with a NAME of id, prompt, '),
        ("question=prompt", 'got "question=prompt", must be NAME=COLUMN, with a NAME of id, prompt, '),
        ("prompt=a prompt=b", '"prompt" is given twice'),
        ("prompt=a chosen=a", '"a" is given twice'),
    ],
)
def test_columns_that_cannot_be_mapped_are_refused(words, expected):
    assert message(train, "--data.train", "f.jsonl", "--data.columns", *words.split()).startswith(
        f"--data.columns: {expected}"
    )
    assert message(decode, "--prompts", "f.jsonl", "--columns", *words.split()).startswith(f"--columns: {expected}")


def test_columns_need_a_file_that_has_them():
    words = ("prompt=question", "chosen=best answer")
    given = train("--data.train", "f.jsonl", "--data.columns", *words).data.columns
    assert given == words and column_names(given, "") == {"prompt": "question", "chosen": "best answer"}
    assert train("--data.eval", "f.jsonl", "--data.columns", *words).data.columns == words
    assert "has no effect on the demo" in message(train, "--data.columns", *words)
    assert "needs --prompts" in message(decode, "--prompt", "Hi", "--columns", *words)
    assert "with a NAME of id, prompt, chosen, rejected" in message(
        decode, "--prompts", "f.jsonl", "--columns", "response=a"
    )


@pytest.mark.parametrize("config_class", [TrainConfig, DecodeConfig])
@pytest.mark.parametrize("columns", [60, 120])
def test_help_describes_every_option(config_class, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as caught:
        parse(config_class, ["--help"], prog="x.py", description="Does " + "a lot " * 40, epilog="examples:\n  x.py")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(len(line) < columns for line in text.splitlines())
    assert text.endswith("examples:\n  x.py\n")
    unbroken = "".join(text.split())  # lines break after hyphens too
    for known in options(config_class):
        assert known.meaning and "".join(known.meaning.split()) in unbroken
        assert f"  {known.flag}" in text
        assert all(choice in unbroken for choice in known.choices)


def test_any_dataclass_of_options_gives_a_command_line():
    @dataclass(frozen=True)
    class Benchmark:
        share: float = option(0.5, "50 % of it")
        rounds: int = 3

        def validate(self):
            pass

    assert parse(Benchmark, ["--rounds", "5"], prog="b.py", description="") == Benchmark(rounds=5)
    with pytest.raises(SystemExit):
        parse(Benchmark, ["--help"], prog="b.py", description="")


def run_python(program):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)


def test_options_are_read_without_importing_the_heavy_libraries():
    heavy = "{'jax', 'flax', 'transformers', 'datasets', 'numpy'}"
    modules = "pargs_jax.commands.command_line, pargs_jax.commands.doors"
    result = run_python(f"import sys, {modules}; print({heavy} & set(sys.modules))")
    assert result.stdout == "set()\n", result.stdout + result.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("out: &a [*a]", "c.yaml: line 1: not a valid config file (aliases (*name) are not supported)"),
        ("a: " + "[" * 3000 + "]" * 3000, "c.yaml: line 1: not a valid config file (nested more than 32 levels deep)"),
        ("seed: " + "9" * 5000, "c.yaml: not a valid config file (Exceeds the limit"),
        ("seed: !!int ''", "c.yaml: not a valid config file ("),
        ("seed: !!bool x", "c.yaml: not a valid config file ("),
        ('out: "a\\0b"', 'c.yaml: out: got "a\\u0000b", must be valid Unicode without NUL characters'),
        ('out: "\\ud800"', 'c.yaml: out: got "\ud800", must be valid Unicode without NUL characters'),
        ("epochs: 1" + "0" * 400, "c.yaml: epochs: got 1000000000"),
        (f"steps: {10**12}", "c.yaml: steps: got 1000000000000, must be at most 2147483647"),
        (
            "batch_size: 1000000",
            "c.yaml: batch_size: got 1000000, must be a whole number, at least 1 and at most 65536",
        ),
        (
            "lora: {rank: 1000000}",
            "c.yaml: lora.rank: got 1000000, must be a whole number, at least 0 and at most 8192",
        ),
    ],
)
def test_values_that_would_fail_later_are_one_line(config_file, text, expected):
    assert message(train, "--config", config_file(text)).startswith(expected)


def test_half_a_surrogate_pair_is_not_an_option():
    expected = '--out: got "\udcff", must be valid Unicode without NUL characters'  # how Python reads the byte 0xff
    assert message(train, "--out", "\udcff") == expected
    assert "must be valid Unicode" in message(decode, "--rm", "a", "b\ud800")


@pytest.mark.parametrize(
    ("read", "typed", "meant"),
    [
        (train, "--learning-rate", "optim.lr"),
        (train, "--output_dir", "out"),
        (train, "--num_train_epochs", "epochs"),
        (train, "--beta", "objective.beta"),
        (decode, "--beta", "weight"),
        (decode, "--top_k", "k"),
        (decode, "--model", "lm"),
        (train, "--model", "model.init"),
    ],
)
def test_the_names_of_other_tools_are_understood(read, typed, meant):
    assert message(read, typed, "3") == f"{typed}: unknown option; did you mean --{meant}?"


def test_every_name_of_another_tool_means_an_option():
    keys = {known.key for config_class in (TrainConfig, DecodeConfig) for known in options(config_class)}
    assert {key for meant in ELSEWHERE.values() for key in meant} <= keys
    assert not keys & ELSEWHERE.keys()


@pytest.mark.parametrize("address", ["10.0.0.1", ":1234", "host:", "host:0", "host:65536", "host:port"])
def test_the_address_of_a_coordinator_has_a_host_and_a_port(address):
    words = ("--distributed", "--processes.count", "2", "--processes.index", "0", "--processes.coordinator")
    assert f'got "{address}", must be HOST:PORT, with a port from 1 to 65535' in message(train, *words, address)
    assert train(*words, "[::1]:1234").processes.coordinator == "[::1]:1234"


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        train("--version")
    assert caught.value.code == 0 and capsys.readouterr().out.startswith("pargs_jax 0.")
