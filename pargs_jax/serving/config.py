"""The options of `serve.py`. How an option is declared: `pargs_jax.options`."""
# ruff: noqa: RUF009 (option() is dataclasses.field(), a declaration and no shared value)

import re
from dataclasses import dataclass
from typing import Literal

from pargs_jax.config import (
    COMPILE_CACHE,
    MESH,
    MOST_ROWS,
    RM_FORMAT,
    DtypeName,
    MethodName,
    PromptFormName,
    WeightFormat,
)
from pargs_jax.data_config import DEMO
from pargs_jax.errors import InputError
from pargs_jax.options import check_each, option, shown

API_KEY = "PARGS_API_KEY"
"""The environment variable with the key that clients must know."""


@dataclass(frozen=True)
class ServeConfig:
    """The options of `serve.py`. Without any, it serves the demo's models."""

    lm: str = option(
        DEMO,
        "the language model: 'demo' (comes with the package), a Hugging Face folder, or a hub id",
        metavar="PATH_OR_HUB_ID",
    )
    rm: tuple[str, ...] = option(
        (),
        "reward models that guide it: folders or hub ids; PATH#LABEL if one has several labels",
        unset="the demo's, with the demo",
        metavar="PATH",
    )
    method: MethodName | None = option(
        None,
        "method of the running batch, which samples token by token; requests can ask for others with the same parts",
        unset="pargs, farma or genarm, by the kind of the reward models",
    )
    name: str | None = option(
        None, "the language model's name in requests", unset="the last part of --lm", metavar="NAME"
    )
    format: PromptFormName | None = option(
        None,
        "prompt format of conversations",
        unset="the one that the reward models were trained with, else the language model's, else plain",
    )
    rm_format: Literal["same", "auto"] = option(
        "same",
        RM_FORMAT,
    )
    k: int | None = option(None, "the most candidates per step", unset="the method's", at_least=1)
    max_prompt_tokens: int | None = option(
        None, "longest prompt, in tokens", unset="what the models' context leaves, up to 1024", at_least=1
    )
    max_new_tokens: int | None = option(
        None, "longest answer, in tokens", unset="half of the models' context, up to 256", at_least=1
    )
    batch_size: int = option(16, "answers decoded at once", at_least=1, at_most=MOST_ROWS)
    steps: int = option(
        8, "tokens drawn before streams and new requests are looked after: fewer answer sooner", at_least=1
    )
    queue: int = option(256, "the most answers that may wait; more requests are told to come again", at_least=0)
    max_n: int = option(16, "the most answers of a request", at_least=1)
    timeout: float = option(600.0, "the most seconds that a request may take", above=0)
    grace: float = option(30.0, "seconds that running answers are given to end at shut-down", at_least=0)
    max_body: int = option(1_000_000, "the longest body of a request, in bytes", at_least=1)
    host: str = option("127.0.0.1", "address to listen at; 0.0.0.0 lets other machines in", metavar="ADDRESS")
    port: int = option(8000, "port to listen at; 0 takes a free one", at_least=0, at_most=65535)
    log_prompts: bool = option(False, "write prompts to the log")
    mesh: str = option("auto", MESH, metavar="NAME")
    compile_cache: str | None = option(None, COMPILE_CACHE, metavar="DIR")
    dtype: DtypeName = option("float32", "number format of the computation; softmax and rewards stay float32")
    lm_dtype: WeightFormat | None = option(
        None, "number format of the language model's weights", unset="that of --dtype"
    )
    rm_dtype: WeightFormat | None = option(None, "number format of the reward models' weights", unset="that of --dtype")
    unroll: Literal["auto", "yes", "no"] = option(
        "auto", "run layers one by one instead of as a scan: faster steps, longer compilation; auto: yes except on TPU"
    )

    def validate(self) -> None:
        """Raises InputError, which names the command-line flag, for the first option that cannot be used."""
        check_each(self)
        if self.name is not None and not re.fullmatch(r"[\w./:-]{1,100}", self.name):
            raise InputError(
                f"--name: got {shown(self.name)}, must be up to 100 letters, digits and any of . _ / : - (+ parts a "
                "name from a method)"
            )
