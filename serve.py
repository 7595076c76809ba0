"""Serves a language model guided by reward models over HTTP: see `python serve.py --help`."""

from pargs_jax.commands.doors import serve

if __name__ == "__main__":
    serve()
