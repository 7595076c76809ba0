"""The front doors of the commands, for the scripts of the repository and those that pip installs.

Nothing here imports JAX before the options are known to be right: `--help` and mistakes answer at once, and so do
signals.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pargs_jax.commands.process import run_as_command
from pargs_jax.errors import InputError
from pargs_jax.freed_memory import keep_freed_memory


class Door(NamedTuple):
    """A command as it is called. Calling a door reads the command line, runs the command and ends the process.

    Attributes:
        module: the module of `pargs_jax.commands` that does the work: it has `run(config)`, and `compile_only(config)`
            where the config has that option.
        config: the class of its options.
        description: what it does, for `--help`.
        examples: command lines, in which `{prog}` is the command's name; one a line, with what it does.
        options: the module of that class.
        more: gives what stands below the examples.
        memory_advice: what needs less memory.
        extra: the extra of the package that it needs, if any.
        keeps_freed_memory: whether it allocates the same large arrays again and again.
    """

    module: str
    config: str
    description: str
    examples: str
    options: str = "pargs_jax.config"
    more: Callable[[], str] = str
    memory_advice: str = "try a smaller --batch-size"
    extra: str = ""
    keeps_freed_memory: bool = False

    def __call__(self) -> None:
        run_as_command(self._run, self.memory_advice)

    def _run(self) -> None:
        from pargs_jax.commands.command_line import parse

        prog = Path(sys.argv[0]).name
        epilog = "examples:\n" + self.examples.format(prog=prog) + self.more()
        config_class = getattr(importlib.import_module(self.options), self.config)
        config = parse(config_class, prog=prog, description=self.description, epilog=epilog)
        module = f"pargs_jax.commands.{self.module}"
        if getattr(config, "compile_only", False):
            from pargs_jax.aot import expect_no_devices

            expect_no_devices(config.mesh)
            sys.exit(0 if importlib.import_module(module).compile_only(config).fits else 1)
        if self.keeps_freed_memory:
            keep_freed_memory()
        import jax

        from pargs_jax.mesh import start

        try:
            command = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not self.extra:
                raise
            raise InputError(f"{error.name}: is not installed; run pip install 'pargs-jax[{self.extra}]'") from error
        with jax.set_mesh(start(config)):
            command.run(config)


def list_methods() -> str:
    """What `--method` takes, for `--help`: each method's score, where it is from, and its numbers."""
    from pargs_jax.decoding.methods import METHODS

    parts = (
        f"  {name}: {method.source}\n" + "".join(f"      {line}\n" for line in (method.score, method.numbers()) if line)
        for name, method in METHODS.items()
    )
    return "\n\nmethods, their scores and their default numbers (docs/methods.md):\n" + "".join(parts)


train = Door(
    "train",
    "TrainConfig",
    "Train a reward model that can score unfinished answers, from preference pairs. Without arguments, train one on "
    "the built-in demo task.",
    """\
  {prog}                                          the demo task, into runs/partial_bt
  {prog} --objective.name bt                      a reward model of full answers to compare with, into runs/bt
  {prog} --config configs/demo_ppo.yaml           the demo's language model, tuned by PPO, into runs/ppo
  {prog} --config configs/hh.yaml --optim.lr 1e-5 --seed 1
  {prog} --config configs/hh.yaml --seed 1 --resume
  {prog} --model.init gpt2 --data.train pairs.jsonl --data.eval held_out.jsonl --data.format hh --out runs/mine
  {prog} --data.train answers.csv --data.columns prompt=question chosen=best rejected=worst --out runs/mine""",
    memory_advice="try --optim.accumulation 2 or more, --model.remat layers, or a smaller --batch-size",
    keeps_freed_memory=True,
)

decode = Door(
    "decode",
    "DecodeConfig",
    "Answer prompts with a frozen language model, guided by reward models at every token. Without arguments, answer "
    "the demo task's unseen prompts with seven methods and print a table.",
    """\
  {prog}                                         the demo task, seven methods compared
  {prog} --method pargs --weight 2 --k 10        one method on it
  {prog} --method pargs --limit 5 --explain F.html   five of its answers, explained token by token
  {prog} --lm gpt2 --method top_k --prompt "The lighthouse keeper"
  {prog} --lm runs/sft --rm runs/partial_bt --method pargs --prompts prompts.jsonl --out answers.jsonl""",
    more=list_methods,
    memory_advice="try a smaller --batch-size, or --dtype bfloat16",
)

serve = Door(
    "serve",
    "ServeConfig",
    "Serve a language model and its reward models over HTTP, in the form of OpenAI's API, with guidance set by each "
    "request. Without arguments, serve the demo's models.",
    """\
  {prog}                                         the demo, at http://127.0.0.1:8000
  {prog} --lm meta-llama/Llama-2-7b-hf --rm runs/rm --dtype bfloat16 --batch-size 64
  PARGS_API_KEY=... {prog} --host 0.0.0.0 --lm runs/sft --rm runs/helpful runs/harmless""",
    options="pargs_jax.serving.config",
    memory_advice="try a smaller --batch-size, --max-prompt-tokens or --max-new-tokens, or --dtype bfloat16",
    extra="serve",
)

evaluate = Door(
    "evaluate",
    "EvaluateConfig",
    "Compare answers of decode.py with judges, metrics and statistics; the report is a table, a page and figures. Or "
    "test reward models on preference pairs, prefix by prefix.",
    """\
  {prog} --answers top_k.jsonl pargs.jsonl --rm runs/judge
  {prog} --answers top_k.jsonl pargs.jsonl --function pargs_jax.demo.task:oracle --guide runs/partial_bt
  {prog} --answers a.jsonl b.jsonl --endpoint.url http://localhost:8000/v1 --endpoint.model NAME
  {prog} --sweep method=top_k,pargs weight=0.5,1,2,4 k=5,10 --function pargs_jax.demo.task:oracle
  {prog} --rm runs/partial_bt runs/bt --pairs.file held_out.jsonl""",
    options="pargs_jax.evaluation.config",
)
