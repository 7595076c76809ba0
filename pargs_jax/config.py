"""Every option of training and decoding, as frozen dataclasses.

An option is declared once, here (`pargs_jax.options`): YAML files (`pargs_jax.config_files`), the command line and
`--help` (`pargs_jax.commands`) are derived from these classes, and `validate()` checks them when they are made from
Python.

    config = TrainConfig(batch_size=32, objective=ObjectiveConfig(name="bt"))
    config = dataclasses.replace(config, seed=1)
    config.validate()
"""
# ruff: noqa: RUF009 (option() is dataclasses.field(), a declaration and no shared value)

import re
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Literal

from pargs_jax.data_config import DEMO, PROMPT_COLUMNS, DataConfig, PromptFormName, column_names
from pargs_jax.decoding.methods import METHODS, NUMBERS
from pargs_jax.errors import InputError
from pargs_jax.objectives import OBJECTIVES
from pargs_jax.objectives.contract import Loss
from pargs_jax.options import check_each, merged_options, option, options, shown, value_of
from pargs_jax.processes_config import ProcessesConfig
from pargs_jax.search_config import SearchConfig

MethodName = Literal[tuple(METHODS)]  # type: ignore[valid-type]
DtypeName = Literal["float32", "bfloat16"]
WeightFormat = Literal["float32", "bfloat16", "int8"]

GROUPED_METHODS = tuple(name for name, method in METHODS.items() if method.reward_model in ("ratio", "look_ahead"))
"""Those whose reward models guide together, several for one weight."""
UNGUIDED_METHODS = tuple(name for name, method in METHODS.items() if not method.guided)
LARGEST_SEED = 2**32 - 1
MOST_ROWS = 2**16
LARGEST_RANK = 2**13


@dataclass(frozen=True)
class ModelConfig:
    """The model to start from."""

    init: str = option(
        DEMO,
        "the language model that training starts from: 'demo' (comes with the package), a Hugging Face folder, "
        "or a hub id",
        metavar="PATH_OR_HUB_ID",
    )
    from_scratch: bool = option(False, "start from random weights, in the shape of --model.init's configuration")
    attention: Literal["full", "prefix_causal"] | None = option(
        None,
        "DeBERTa only. full: every prefix is read separately; prefix_causal: an answer token sees only the tokens "
        "before it, and one pass reads all prefixes",
        unset="as the checkpoint says",
    )
    dropout: float = option(0.0, "share of activations that training drops", at_least=0, below=1)
    remat: Literal["none", "products", "layers"] = option(
        "none",
        "what the backward pass computes again to save memory. none: nothing; products: all but the products with "
        "weights; layers: whole layers (least memory, a third more work)",
        may_change=True,
    )


@dataclass(frozen=True)
class _ObjectiveChoice:
    """The loss."""

    name: Literal[tuple(OBJECTIVES)] = option(  # type: ignore[valid-type]
        "partial_bt", "; ".join(f"{name}: {loss.meaning}" for name, loss in OBJECTIVES.items())
    )
    chunk: int = option(
        8,
        "models with full attention: how many prefixes of a pair are read at once; fewer need less memory",
        at_least=1,
        may_change=True,
    )

    @property
    def loss(self) -> Loss:
        """The objective, with its options."""
        kind = OBJECTIVES[self.name]
        return kind(**{declared.name: getattr(self, declared.name) for declared in fields(kind)})

    def validate(self, max_length: int) -> None:
        """Raises InputError for an option that this loss does not have, or that does not suit it."""
        for known in options(type(self)):
            owners = [name for name, loss in OBJECTIVES.items() if known.key in {own.name for own in fields(loss)}]
            value = value_of(self, known)
            if owners and self.name not in owners and value != known.default:
                raise InputError(
                    f"--objective.{known.flag.removeprefix('--')}: got {shown(value)}, but this is not an option of "
                    f"--objective.name {self.name}; it belongs to {' and '.join(owners)}"
                )
        self.loss.validate(max_length)


ObjectiveConfig = make_dataclass(
    "ObjectiveConfig",
    merged_options(OBJECTIVES),
    bases=(_ObjectiveChoice,),
    namespace={"__doc__": _ObjectiveChoice.__doc__, "__module__": __name__},
    frozen=True,
)
"""Which objective, and the options of all of them: each is declared beside its loss (`pargs_jax.objectives`)."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = option(2e-3, "peak learning rate", above=0)
    weight_decay: float = option(0.0, "decoupled weight decay", at_least=0)
    b1: float = option(0.9, "decay rate of the mean gradient", at_least=0, below=1)
    b2: float = option(0.999, "decay rate of the mean squared gradient", at_least=0, below=1)
    eps: float = option(1e-8, "added to the denominator of the update", above=0)
    warmup: float = option(0.05, "share of the steps in which the learning rate rises from 0", at_least=0, below=1)
    schedule: Literal["cosine", "linear", "constant"] = option("cosine", "the learning rate after the warm-up")
    moment_dtype: DtypeName = option("float32", "number format of the mean gradient")
    square_dtype: DtypeName = option(
        "float32",
        "number format of the mean squared gradient; bfloat16 rounds it up or down at random, because rounding to the "
        "nearest would lose its small changes",
    )
    clip: float = option(1.0, "largest global norm of the gradient; 0: no clipping", at_least=0)
    accumulation: int = option(1, "micro-batches that an optimizer step is split into", at_least=1, may_change=True)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank additions to a frozen model (LoRA)."""

    rank: int = option(
        0,
        "rank of the additions, such as 16; only they and the reward head are trained; 0: train the whole model",
        at_least=0,
        at_most=LARGEST_RANK,
    )
    alpha: float = option(32.0, "the additions are scaled by alpha / rank", above=0)
    layers: str = option(
        ".*",
        "regular expression for the names of the layers to adapt, such as 'query|value'; '.*' is all linear layers of "
        "the blocks. Token embeddings (embed) and a vocabulary head with a matrix of its own (head) are adapted only "
        "if their names are spelled out, as in '.*|embed|head'",
        metavar="REGEX",
    )

    def validate(self) -> None:
        """Raises InputError for a pattern that is not a regular expression, and for options without use at rank 0."""
        if not self.rank:
            for flag, value, default in (
                ("--lora.alpha", self.alpha, LoraConfig.alpha),
                ("--lora.layers", self.layers, LoraConfig.layers),
            ):
                if value != default:
                    raise InputError(
                        f"{flag}: got {shown(value)}, but --lora.rank is 0, so the whole model is trained; "
                        "give a rank, such as 16, or leave this out"
                    )
        try:
            re.compile(self.layers)
        except re.error as error:
            raise InputError(f"--lora.layers: {shown(self.layers)} is not a regular expression ({error})") from None


MESH = (
    "which devices to use and how to arrange them: auto, cpu, cpu-N (virtual devices), gpu-N, a TPU slice such as "
    "tpu-v4-8, axes such as data=2,fsdp=2,tensor=2, or a name and axes"
)
COMPILE_ONLY = (
    "compile for the TPU slice or the H100 (gpu-1) named by --mesh, report the memory and work that the program needs, "
    "and stop; works without the device, and reads no weights or data"
)
RM_FORMAT = (
    "what reward models read: the 'same' text as the language model (with --format chat, in their own chat template), "
    "or 'auto': always their own chat template, if they have one and do not remember another format"
)
COMPILE_CACHE = "folder that keeps compiled programs for the next start, except those that call the host"
DISTRIBUTED = "this process is one of several in the same run, each started with this flag"


@dataclass(frozen=True)
class LogConfig:
    """Where metrics go besides metrics.jsonl in --out."""

    tensorboard: bool = option(
        False, "also write TensorBoard logs to --out/tensorboard; needs the extra tensorboard", may_change=True
    )
    wandb: str | None = option(
        None,
        "also send metrics to this Weights & Biases project; needs the extra wandb",
        metavar="PROJECT",
        may_change=True,
    )


@dataclass(frozen=True)
class TrainConfig:
    """The options of `train.py`. The defaults train a partial reward model on the demo task."""

    mesh: str = option("auto", MESH, metavar="NAME", may_change=True)
    compile_only: bool = option(False, COMPILE_ONLY)
    compile_cache: str | None = option(None, COMPILE_CACHE, metavar="DIR", may_change=True)
    distributed: bool = option(False, DISTRIBUTED, may_change=True)
    out: str | None = option(
        None,
        "folder for checkpoints, metrics and the exported model",
        unset="runs/<objective.name>",
        metavar="DIR",
        may_change=True,
    )
    resume: bool = option(False, "continue from the newest checkpoint in --out", may_change=True)
    seed: int = option(0, "seed of the weights, the data order and dropout", at_least=0, at_most=LARGEST_SEED)
    steps: int | None = option(None, "optimizer steps", unset="computed from --epochs", at_least=1, may_change=True)
    epochs: float = option(1.0, "passes over the training pairs, if --steps is not given", above=0, may_change=True)
    dtype: DtypeName = option("float32", "number format of the computation; weights, losses and rewards stay float32")
    batch_size: int = option(
        8, "pairs per optimizer step; in ppo and rloo, answers per step", at_least=1, at_most=MOST_ROWS
    )
    max_length: int = option(128, "most tokens of prompt and answer together; longer texts are cut", at_least=2)
    pack: int = option(0, "pack pairs into rows of so many tokens, with each prompt once; 0: do not pack", at_least=0)
    eval_every: int = option(0, "steps between evaluations; 0: only at the end", at_least=0, may_change=True)
    save_every: int = option(200, "steps between checkpoints; 0: only at the end", at_least=0, may_change=True)
    keep: int = option(2, "how many of the newest checkpoints to keep", at_least=1, may_change=True)
    keep_best: int = option(
        1,
        "how many checkpoints with the best evaluations to keep as well; each is saved at its evaluation; 0: none",
        at_least=0,
        may_change=True,
    )
    best_metric: Literal["loss", "accuracy"] = option(
        "loss",
        "held-out metric that ranks evaluations: the smallest loss or the highest accuracy is best",
        may_change=True,
    )
    log_every: int = option(10, "steps between lines of metrics", at_least=1, may_change=True)
    loss_limit: float = option(
        10.0,
        "stop when the loss is more than this many times the first loss, or chance level if higher; 0: never; losses "
        "that depend on the data, such as those of arm and ppo, have no limit",
        at_least=0,
        may_change=True,
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()
    processes: ProcessesConfig = ProcessesConfig()
    log: LogConfig = LogConfig()

    @property
    def output_folder(self) -> Path:
        """Where the run is written: `out`, or `runs/<objective name>`."""
        return Path(self.out) if self.out is not None else Path("runs", self.objective.name)

    def validate(self) -> None:
        """Raises InputError, which names the command-line flag, for the first option that cannot be used."""
        check_each(self)
        self.data.validate()
        self.objective.validate(self.max_length)
        if self.best_metric == "accuracy" and not self.objective.loss.has_accuracy:
            raise InputError(f"--best-metric: got 'accuracy', but {self.objective.name} has none; must be 'loss'")
        self.lora.validate()
        self.processes.validate(self.distributed)
        if self.steps is not None and self.epochs != TrainConfig.epochs:
            raise InputError(
                f"--steps and --epochs: got both ({self.steps} and {self.epochs:g}), give only one "
                "(--steps null unsets the one in a config file)"
            )
        if self.batch_size % self.optim.accumulation:
            raise InputError(
                f"--batch-size: got {self.batch_size}, must be a multiple of "
                f"--optim.accumulation ({self.optim.accumulation})"
            )


@dataclass(frozen=True)
class DecodeConfig:
    """The options of `decode.py`. The defaults compare seven methods on the demo task's unseen prompts."""

    lm: str = option(
        DEMO,
        "the language model: 'demo' (comes with the package), a Hugging Face folder, a hub id, or MODEL+ADAPTER for a "
        "PEFT adapter",
        metavar="PATH_OR_HUB_ID",
    )
    rm: tuple[str, ...] = option(
        (),
        "reward models that guide it: folders, hub ids or PEFT adapters, of the kind that the method needs; PATH#LABEL "
        "if one has several labels; see docs/models.md",
        metavar="PATH",
    )
    method: MethodName | None = option(
        None, "how to choose the next token: see the list below", unset="compare seven, on the demo only"
    )
    prompt: str | None = option(None, "one prompt to answer", metavar="TEXT", may_be_empty=True)
    prompts: str | None = option(
        None,
        "file of prompts to answer",
        unset="the demo's unseen prompts, with the demo",
        metavar="FILE",
        may_change=True,
    )
    columns: tuple[str, ...] = option(
        (),
        "the file's names for columns of --prompts, where they differ: prompt=question",
        metavar="NAME=COLUMN",
        may_change=True,
    )
    format: PromptFormName | None = option(
        None,
        "prompt format",
        unset="the one that the reward models were trained with, else the language model's, else plain",
    )
    rm_format: Literal["same", "auto"] = option(
        "same",
        RM_FORMAT,
    )
    out: str | None = option(
        None,
        "JSONL file for the answers; a second run continues after the rows in it",
        metavar="F.jsonl",
        may_change=True,
    )
    trace: str | None = option(
        None,
        "JSONL file for a trace of each answer in --out: every token with its probability before and after "
        "guidance, its rewards and the KL; see docs/traces.md",
        metavar="F.jsonl",
        may_change=True,
    )
    trace_candidates: bool = option(
        False, "with --trace: also the candidates of every token, with their numbers", may_change=True
    )
    n: int = option(
        1,
        "answers per prompt; more than one only with a method that samples",
        at_least=1,
        at_most=MOST_ROWS,
        may_change=True,
    )
    explain: str | None = option(
        None,
        "HTML page that explains the answers token by token, next to the unguided answers of the same seed; see "
        "docs/explain.md",
        metavar="F.html",
        may_change=True,
    )
    k: int | None = option(
        None, "candidates per step: the language model's k most likely tokens", unset="the method's", at_least=1
    )
    weight: tuple[float, ...] = option(
        (), "reward weight: one for all reward models, or one for each (or each pair)", unset="the method's"
    )
    top_p: float | None = option(
        None, "top_p: total probability of the candidates", unset="the method's", above=0, at_most=1
    )
    gate_entropy: float | None = option(
        None,
        "guide only the steps where the language model's entropy is at least this many nats",
        unset="guide all",
        at_least=0,
    )
    look_ahead: int | None = option(
        None, "transfer_q: tokens that the aligned model writes after each candidate", unset="the method's", at_least=1
    )
    preference: tuple[float, ...] = option(
        (), "parm: weights of the objectives, which sum to 1; a column 'preference' sets them for each prompt"
    )
    temperature: float | None = option(None, "temperature of methods that sample", unset="the method's", above=0)
    max_new_tokens: int = option(128, "longest answer, in tokens", at_least=1)
    batch_size: int = option(
        16,
        "answers decoded at once; in a search, prompts, each with several rows",
        at_least=1,
        at_most=MOST_ROWS,
        may_change=True,
    )
    stop: tuple[str, ...] = option((), "texts that end an answer; it ends before the first one in it", metavar="TEXT")
    seed: int = option(0, "seed for sampling", at_least=0, at_most=LARGEST_SEED)
    mesh: str = option("auto", MESH, metavar="NAME", may_change=True)
    compile_only: bool = option(False, COMPILE_ONLY)
    compile_cache: str | None = option(None, COMPILE_CACHE, metavar="DIR", may_change=True)
    prompt_length: int = option(512, "with --compile-only: tokens in a prompt", at_least=2)
    distributed: bool = option(False, DISTRIBUTED, may_change=True)
    dtype: DtypeName = option("float32", "number format of the computation; softmax and rewards stay float32")
    lm_dtype: WeightFormat | None = option(
        None,
        "number format of the language model's weights; int8: its layers' matrices, each output channel with a "
        "scale, computed in --dtype",
        unset="that of --dtype",
    )
    rm_dtype: WeightFormat | None = option(
        None, "number format of the reward models' weights, as --lm-dtype", unset="that of --dtype"
    )
    unroll: Literal["auto", "yes", "no"] = option(
        "auto",
        "run layers one by one instead of as a scan: faster steps, longer compilation; auto: yes except on TPU",
        may_change=True,
    )
    cut_prompts: bool = option(
        False,
        "cut prompts that are too long for a model: there they lose tokens on the left, after its BOS token; otherwise "
        "they are refused",
        may_change=True,  # of prompts that fit, it changes nothing
    )
    limit: int | None = option(None, "answer only the first N prompts", unset="all", at_least=1, may_change=True)
    search: SearchConfig = SearchConfig()
    processes: ProcessesConfig = ProcessesConfig()

    @property
    def numbers_in_effect(self) -> str:
        """The numbers that the method uses, its own where options are not given; empty without a method."""
        given = {**self.search.given, **{name: getattr(self, name) for name in NUMBERS}}
        return "" if self.method is None else METHODS[self.method].numbers(given)

    def validate(self) -> None:
        """Raises InputError, which names the command-line flag, for the first option that cannot be used."""
        check_each(self)
        self.processes.validate(self.distributed)
        if column_names(self.columns, "--columns", PROMPT_COLUMNS) and self.prompts is None:
            raise InputError("--columns: needs --prompts, the file that has the columns")
        if self.prompt is not None and self.prompts is not None:
            raise InputError("--prompt and --prompts: got both, give only one")
        if self.prompt is not None and self.limit is not None:
            raise InputError("--limit: has no effect with --prompt, which is one prompt; leave it out")
        if self.prompt_length != DecodeConfig.prompt_length and not self.compile_only:
            raise InputError("--prompt-length: needs --compile-only; otherwise prompts have their own lengths")
        if self.trace is not None and self.out is None:
            raise InputError("--trace: needs --out, the file of the answers to trace")
        if self.trace is not None and Path(self.trace) == Path(self.out):
            raise InputError(f"--trace and --out: got {self.trace} for both, must be two files")
        if self.trace_candidates and self.trace is None:
            raise InputError("--trace-candidates: needs --trace, the file for the candidates")
        if self.explain is not None and self.out is not None:
            raise InputError(
                "--explain: cannot be used with --out; write traces instead (--trace F.jsonl --trace-candidates) "
                "and make the page from them (python -m pargs_jax.commands.explain)"
            )
        named = {"--trace": self.trace is not None, "--explain": self.explain is not None, "--n": self.n > 1}
        named["--stop"] = bool(self.stop)
        if self.method is None and not self.compile_only and any(named.values()):
            flag = next(flag for flag, is_given in named.items() if is_given)
            raise InputError(f"{flag}: needs --method NAME, one of {', '.join(METHODS)}")
        if self.method is None and self.search.given:
            flag = next(iter(self.search.given)).replace("_", "-")
            raise InputError(f"--search.{flag}: needs --method NAME, one that searches")
        if self.method not in GROUPED_METHODS and len(self.weight) not in (0, 1, len(self.rm)):
            raise InputError(
                f"--weight: got {len(self.weight)} weights for {len(self.rm)} reward models (--rm), "
                "give one for all or one for each"
            )
        if self.lm != DEMO:
            self._validate_without_demo()

    def _validate_without_demo(self) -> None:
        """Only the demo has prompts, a reward model and a choice of methods of its own."""
        if self.prompt is None and self.prompts is None and not self.compile_only:
            raise InputError(f"--lm {self.lm}: needs prompts to answer; give --prompt TEXT or --prompts FILE")
        if self.method is None and not self.compile_only:
            raise InputError(f"--lm {self.lm}: needs --method NAME, one of {', '.join(METHODS)}")
        if self.method not in UNGUIDED_METHODS and not self.rm and not self.compile_only:
            raise InputError(
                f"--method {self.method}: needs a reward model; give --rm PATH, "
                f"or an unguided method ({', '.join(UNGUIDED_METHODS)})"
            )
