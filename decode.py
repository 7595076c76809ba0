"""Answers prompts with a language model guided by reward models: see `python decode.py --help`."""

from pargs_jax.commands.doors import decode

if __name__ == "__main__":
    decode()
