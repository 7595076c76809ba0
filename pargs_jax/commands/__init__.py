"""The commands: what `train.py`, `decode.py` and `evaluate.py` do, from the command line to the result.

Each command is one module with a function `run(config)`, and `compile_only(config)` where it has that option; both
assemble the program with the same functions. `doors` names the commands, says what their `--help` says, and imports
these modules only when the options are known to be right.

To add a command, write its config in `pargs_jax.config`, its module here, its `Door` in `doors`, a front door like
`train.py`, and a line in `[project.scripts]` of pyproject.toml.
"""
