"""The package as a whole: public names, the documented example, what imports what."""

import ast
import dataclasses
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pargs_jax as pj
from pargs_jax.commands import doors
from pargs_jax.data.batches import Batch
from pargs_jax.models import hf
from pargs_jax.testing import TINY_CONFIGS, tiny_model

PACKAGE = Path(pj.__file__).parent
REPOSITORY = Path(__file__).parents[1]
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}

# Which parts of the package each part may import, by the first part of a module's name. Arrows go down only.
MAY_IMPORT = {
    "errors": set(),
    "options": {"errors"},
    "search_config": {"options"},
    "processes_config": {"options", "errors"},
    "data_config": {"options", "errors"},
    "config": {
        "decoding",
        "objectives",
        "search_config",
        "processes_config",
        "data_config",
        "options",
        "errors",
    },  # of decoding, the table of methods
    "names_elsewhere": set(),
    "freed_memory": set(),
    "config_files": {"names_elsewhere", "options", "errors"},
    "signals": {"errors"},
    "durable_files": {"errors"},
    "roll_call": {"errors"},
    "lost_processes": set(),
    "processes": {"lost_processes", "roll_call", "processes_config", "errors"},
    "json_text": {"errors"},
    "pages": set(),
    "aot": {"errors"},
    "mesh": {"aot", "processes", "config", "errors"},
    "sharding": {"errors"},
    "progress": set(),
    "text": {"json_text", "errors"},
    "data": {"text", "durable_files", "json_text", "errors"},
    "demo": {"errors"},
    "models": {"sharding", "durable_files", "json_text", "errors"},
    "objectives": {"data", "options", "errors"},  # of data, the type of a batch
    "decoding": {"models", "sharding", "errors"},
    "training": {
        "objectives",
        "models",
        "data",
        "text",
        "sharding",
        "processes",
        "signals",
        "durable_files",
        "json_text",
        "progress",
        "config_files",
        "config",
        "options",
        "errors",
    },
    "generation": {
        "decoding",
        "models",
        "data",
        "text",
        "sharding",
        "processes",
        "durable_files",
        "json_text",
        "progress",
        "data_config",
        "config_files",
        "config",
        "options",
        "errors",
    },
    "evaluation": {
        "generation",
        "pages",
        "decoding",
        "objectives",
        "models",
        "data",
        "text",
        "sharding",
        "durable_files",
        "json_text",
        "data_config",
        "config_files",
        "config",
        "options",
        "errors",
    },
    "serving": {
        "pages",
        "generation",
        "decoding",
        "data",
        "text",
        "json_text",
        "data_config",
        "config",
        "options",
        "errors",
    },
    "testing": {"data", "text", "demo", "models"},
}
# The top: everything but what only tests use.
MAY_IMPORT["commands"] = MAY_IMPORT.keys() - {"testing"}
# Parts of `decoding` that know arrays, never models; and what needs no more than names.
MAY_IMPORT_WITHIN = {
    "config": {
        "decoding.methods",
        "objectives",
        "objectives.contract",
        "search_config",
        "processes_config",
        "data_config",
        "options",
        "errors",
    },
    "decoding.proposals": {"errors"},
    "decoding.rules": {"decoding.proposals"},
    "decoding.methods": {"decoding.proposals", "decoding.rules", "decoding.search"},
    "decoding.search.order_statistics": set(),
}
WITHOUT_JAX = (
    "search_config",
    "processes_config",
    "data_config",
    "names_elsewhere",
    "errors",
    "signals",
    "freed_memory",
    "options",
    "config",
    "config_files",
    "durable_files",
    "json_text",
    "pages",
    "roll_call",
    "lost_processes",
    "text",
    "data",
    "demo",
)
WITHOUT_JAX_WITHIN = (
    "commands.process",
    "commands.command_line",
    "commands.explain",
    "evaluation.config",
    "serving.config",
    "evaluation.explanation",
    "generation.traces",
)


def imported_modules(path):
    """Every module that a file imports, at its top or inside functions, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            # `from pargs_jax.data import demo` imports a module of that folder.
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            known = [name for name in submodules if name.removeprefix("pargs_jax.") in FILES]
            yield from known or [node.module]


def package_imports(path):
    return {name.removeprefix("pargs_jax.") for name in imported_modules(path) if name.startswith("pargs_jax")}


@pytest.mark.parametrize("module", [name for name in FILES if name != "__init__"])
def test_imports_go_down_only(module):
    part = module.partition(".")[0]
    outside = {name.partition(".")[0] for name in package_imports(FILES[module])} - {part}
    assert outside <= MAY_IMPORT[part]
    if module in MAY_IMPORT_WITHIN:
        assert package_imports(FILES[module]) <= MAY_IMPORT_WITHIN[module]
    if part in WITHOUT_JAX or module in WITHOUT_JAX_WITHIN:
        roots = {name.partition(".")[0] for name in imported_modules(FILES[module])}
        assert not roots & {"jax", "flax", "optax", "orbax"}


def test_no_part_of_the_package_is_without_a_rule():
    assert {name.partition(".")[0] for name in FILES} == MAY_IMPORT.keys() | {"__init__"}


def test_words_of_flags_are_left_to_the_commands():
    """A library says `option columns`: whoever calls it from Python or by YAML has no flags."""
    own = ("commands", "options", "demo")  # `python -m pargs_jax.demo.task` has flags of its own
    for module, path in FILES.items():
        if not module.startswith(own) and not module.endswith("config"):
            found = re.findall(r"(?<![\w-])--(?!xla_)[a-z][\w.-]*", path.read_text())
            assert not found, f"{path}: {found}"


@pytest.mark.parametrize("name", ["train", "decode", "evaluate", "serve"])
def test_installed_commands_are_the_front_doors(name):
    (command,) = importlib.metadata.entry_points(group="console_scripts", name=f"pargs-{name}")
    assert command.load() is getattr(doors, name)


def test_files_stay_short():
    sources = [*FILES.values(), *(REPOSITORY / "tests").rglob("*.py")]
    assert [path.name for path in sources if len(path.read_text().splitlines()) > 500] == []
    doors = [REPOSITORY / name for name in ("train.py", "decode.py", "evaluate.py")]
    assert all(len(path.read_text().splitlines()) < 10 for path in doors)


@pytest.mark.parametrize("name", pj.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(pj, name)
    if inspect.isclass(value) or callable(value):
        written = inspect.getdoc(value) or ""
        # Dataclasses and named tuples without a docstring get their signature for one.
        assert written and not written.startswith(f"{name}(")
    assert name in dir(pj)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'partial_bradley_tarry'"):
        pj.partial_bradley_tarry  # noqa: B018


def test_type_checkers_see_the_names_that_are_loaded_on_first_use():
    tree = ast.parse(FILES["__init__"].read_text())
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for node in guarded.body for alias in node.names}
    assert seen == set(pj.__all__)


def run_python(*arguments):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=REPOSITORY, timeout=120
    )


@pytest.mark.parametrize("script", [None, "train.py", "decode.py", "evaluate.py"])
def test_importing_and_asking_for_help_import_no_jax(script):
    use = "import pargs_jax; dir(pargs_jax)"
    if script is not None:
        use = f"import runpy; sys.argv = ['{script}', '--help']; runpy.run_path('{script}', run_name='__main__')"
    ended = run_python("-c", f"import sys, atexit; atexit.register(lambda: print('jax' in sys.modules)); {use}")
    assert (ended.returncode, ended.stdout.splitlines()[-1]) == (0, "False"), ended.stderr


def test_the_documented_example_works(monkeypatch):
    """Runs the code in the package's docstring as it stands, on tiny models in the checkpoints' place."""
    loaded = []

    def load_tiny_model(source, head, **options):
        config = dataclasses.replace(TINY_CONFIGS["llama"], context_length=256)
        _, params = tiny_model("llama", head, seed=len(loaded))
        loaded.append(source)
        return hf.Pretrained(pj.CausalModel(config, head), params, False, {}, (2,))

    monkeypatch.setattr(hf, "load_model", load_tiny_model)
    rng = np.random.default_rng(0)
    scope = {
        "prompts": rng.integers(0, 61, (3, 5), np.int32),
        "lengths": np.array([5, 2, 3], np.int32),
        "batch": Batch(
            rng.integers(0, 61, (2, 4), np.int32),
            np.array([4, 2], np.int32),
            rng.integers(0, 61, (2, 2, 6), np.int32),
            np.array([[6, 3], [2, 5]], np.int32),
            np.ones(2, np.float32),
        ),
    }
    paragraphs = pj.__doc__.split("\n\n")
    code = "\n\n".join(paragraph for paragraph in paragraphs if paragraph.startswith("    "))
    exec(compile(textwrap.dedent(code), "the example", "exec"), scope)

    assert len(loaded) == 2
    answers = scope["answers"]
    assert answers.tokens.shape == (3, 128) and answers.lengths.shape == (3,)
    assert answers.trace.rewards.shape == (3, 128, 1)
    assert ((answers.lengths == 128) | (answers.tokens[jnp.arange(3), answers.lengths - 1] == 2)).all()
    # The recorded rewards are those of the reward model on the answers as they came out.
    rm = scope["rm"]
    texts = np.concatenate([scope["prompts"], answers.tokens], axis=1)
    hidden = jax.jit(rm.model.encode)(rm.params, texts, 5 - scope["lengths"])
    rewards = np.asarray(rm.model.rewards(rm.params, hidden))[:, 5:]
    real = np.arange(128) < np.asarray(answers.lengths)[:, None]
    np.testing.assert_allclose(answers.trace.rewards[..., 0][real], rewards[real], atol=1e-4)
    assert 0 < float(scope["loss"]) < 20 and 0 <= float(scope["metrics"]["accuracy"]) <= 1
    assert scope["rewards"].shape == (2, 2, 6)


def test_the_oldest_versions_that_are_tested_are_the_bounds():
    """Those of Python 3.11: `tests/oldest.txt` is what `make test-oldest` installs."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    bounds = {}
    for requirement in project["dependencies"]:
        named, _, marker = requirement.partition(";")
        name, version = re.match(r"([\w-]+)[=>]=([\d.]+)", named).groups()
        if ">=" not in marker:
            bounds[name] = version
    lines = (REPOSITORY / "tests" / "oldest.txt").read_text().splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert oldest.keys() == bounds.keys()
    for name, version in oldest.items():
        assert f"{version}.".startswith(f"{bounds[name]}."), name
