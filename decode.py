"""Answers prompts with a language model guided by reward models: see `python decode.py --help`."""

import sys

from pargs_jax.command import command

DESCRIPTION = """Answer prompts with a frozen language model whose next token is guided by reward models. Without
arguments it decodes the demo task's unseen prompts with every method and prints a table."""
EXAMPLES = """examples:
  decode.py                                         the demo task, all methods compared
  decode.py --method pargs --weight 2 --k 10        one method on it
  decode.py --method pargs --limit 5 --explain page.html   why five of its answers came out as they did
  decode.py --lm gpt2 --method top_k --prompt "The lighthouse keeper"
  decode.py --lm runs/sft --rm runs/partial_bt --method pargs --prompts prompts.jsonl --out answers.jsonl"""


def main() -> None:
    from pargs_jax.cli import parse
    from pargs_jax.config import DEMO, DecodeConfig

    config = parse(DecodeConfig, prog="decode.py", description=DESCRIPTION, epilog=EXAMPLES)
    # After the options are known to be right: these import jax.
    if config.compile_only:
        from pargs_jax.aot import expect_no_devices

        expect_no_devices()
        from pargs_jax.compile_only import compile_decoding

        sys.exit(0 if compile_decoding(config).fits else 1)
    import jax

    from pargs_jax.evaluation.comparison import compare_methods
    from pargs_jax.evaluation.decode_and_explain import decode_and_explain
    from pargs_jax.generation.run import generate
    from pargs_jax.mesh import start

    with jax.set_mesh(start(config)):
        if config.method is None and config.lm == DEMO:
            compare_methods(config)
        elif config.explain is not None:
            decode_and_explain(config)
        else:
            generate(config)


if __name__ == "__main__":
    command(main)
