"""Trains a reward model that can score unfinished answers (or a language model): see `python train.py --help`."""

from pargs_jax.commands.doors import train

if __name__ == "__main__":
    train()
