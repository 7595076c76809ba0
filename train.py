"""Trains a reward model that can score unfinished answers (or a language model): see `python train.py --help`."""

import sys

from pargs_jax.command import command

DESCRIPTION = """Train a reward model that can score unfinished answers, on preference pairs. Without arguments it
trains one on the built-in demo task."""
EXAMPLES = """examples:
  train.py                                          the demo task, into runs/partial_bt
  train.py --objective.name bt                      the full-sequence reward model to compare with, into runs/bt
  train.py --config configs/hh.yaml --optim.lr 1e-5 --seed 1
  train.py --config configs/hh.yaml --seed 1 --resume
  train.py --model.init gpt2 --data.train pairs.jsonl --data.eval held_out.jsonl --data.format hh --out runs/mine
  train.py --data.train answers.csv --data.columns prompt=question chosen=best rejected=worst --out runs/mine"""


def main() -> None:
    from pargs_jax.cli import parse
    from pargs_jax.config import TrainConfig

    config = parse(TrainConfig, prog="train.py", description=DESCRIPTION, epilog=EXAMPLES)
    # After the options are known to be right: these import jax.
    if config.compile_only:
        from pargs_jax.aot import expect_no_devices

        expect_no_devices()
        from pargs_jax.compile_only import compile_training

        sys.exit(0 if compile_training(config).fits else 1)
    import jax

    from pargs_jax.mesh import start
    from pargs_jax.training.run import train

    with jax.set_mesh(start(config)):
        train(config)


if __name__ == "__main__":
    command(main)
