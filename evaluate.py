"""Evaluates answers, and reward models alone: see `python evaluate.py --help`."""

from pargs_jax.commands.doors import evaluate

if __name__ == "__main__":
    evaluate()
