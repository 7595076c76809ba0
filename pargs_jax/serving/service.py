"""What a server serves: models by their names, and how the fields of a request become orders to the engine."""

import dataclasses
import secrets
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pargs_jax.config import LARGEST_SEED
from pargs_jax.data.preferences import Prompt
from pargs_jax.decoding.methods import METHODS, Method
from pargs_jax.errors import InputError
from pargs_jax.generation.guidance import check_roles, count_guides, guide_names
from pargs_jax.generation.plan import OwnShape, Request, Settings
from pargs_jax.generation.reward_models import SMALLEST_WIDTH, padded_width
from pargs_jax.generation.scheduler import Scheduler
from pargs_jax.generation.session import Session
from pargs_jax.serving.fields import MOST_ALTERNATIVES, Asked, Chat, Completion, RefusedField
from pargs_jax.text.prompts import PromptForm

T = TypeVar("T")

USUAL_PROMPT, USUAL_ANSWER = 1024, 256
"""The longest prompt and answer of a server that is not told otherwise, in tokens."""
UNGUIDED_K = 20
"""Candidates of a server without reward models; other tokens can be drawn too, so this only says what `k` may be."""


class Service:
    """A session's models, as requests name them.

    `NAME` is the language model itself, and `NAME+METHOD` the language model guided by a method. All of them run in one
    batch: they differ in their rows' settings alone.
    """

    def __init__(
        self,
        session: Session,
        method: str,
        form: PromptForm,
        *,
        name: str,
        k: int | None,
        max_prompt_tokens: int | None,
        max_new_tokens: int | None,
        most_answers: int,
    ) -> None:
        """
        Args:
            session: the loaded models.
            method: the method of the running batch; other methods with the same parts can be asked for too.
            form: how a conversation becomes a prompt.
            name: the language model's name.
            k: the most candidates of a step; None for the method's.
            max_prompt_tokens, max_new_tokens: the longest prompt and answer; None for what the models' contexts allow,
                up to `USUAL_PROMPT` and `USUAL_ANSWER`.
            most_answers: the most answers of a request.

        Raises InputError for a method that cannot be served.
        """
        self.session, self.form, self.name, self.most_answers = session, form, name, most_answers
        context = session.context
        self.max_new_tokens = max_new_tokens or min(USUAL_ANSWER, context // 2)
        self.max_prompt_tokens = max_prompt_tokens or min(USUAL_PROMPT, context - self.max_new_tokens)
        if min(self.max_prompt_tokens, context - self.max_prompt_tokens - self.max_new_tokens + 1) < 1:
            raise InputError(
                f"max_prompt_tokens and max_new_tokens: {self.max_prompt_tokens} and {self.max_new_tokens} exceed the "
                f"models' context of {context} tokens"
            )
        self.method = METHODS[method]
        if self.method.search or self.method.draws != "sample" or self.method.reward_model == "look_ahead":
            raise InputError(f"method: {method} cannot be served, must be a method that samples token by token")
        check_roles(self.method, session.reward_models)
        self.guides = _names(guide_names(self.method, session.reward_models) if self.method.guided else ())
        self.limits = Settings(
            self.method,
            k=self._most_candidates(k),
            max_new_tokens=self.max_new_tokens,
            trace="candidates",
            shape=OwnShape(),
            alternatives=MOST_ALTERNATIVES,
        )
        self.methods = {name: each for name, each in METHODS.items() if self._is_served(each)}
        """The methods that requests can ask for."""

    @property
    def prompt_widths(self) -> list[int]:
        """The widths that prompts are padded to: few, because each one is compiled."""
        widths = [SMALLEST_WIDTH]
        while widths[-1] < self.max_prompt_tokens:
            widths.append(2 * widths[-1])
        return [*widths[:-1], padded_width(self.max_prompt_tokens)]

    @property
    def models(self) -> list[str]:
        """The names of all models: the language model, and the language model with each guided method."""
        return [self.name, *(f"{self.name}+{name}" for name, each in self.methods.items() if each.guided)]

    def make_scheduler(self, places: int, steps: int) -> Scheduler:
        """The running batch."""
        return self.session.scheduler(self.limits, places, steps=steps, prompt_widths=self.prompt_widths)

    def warm_up(self, scheduler: Scheduler) -> None:
        """Compiles what any request needs."""

        def request(width: int, is_bare: bool) -> Request:
            recorded = self._recorded(wants_candidates=not is_bare)
            settings = dataclasses.replace(self._plain(1.0, 0), max_new_tokens=1, **recorded)
            ids = [[1] * min(width, self.max_prompt_tokens)] * (1 + len(self.session.reward_models))
            return Request(Prompt("", ""), 0, settings, ids[0], ids[1:])

        scheduler.warm_up(request)

    def requests(self, asked: Asked) -> list[Request]:
        """A request for each answer that is asked for: those to the first prompt, then those to the next one.

        Raises RefusedField for what cannot be honoured.
        """
        settings = self.settings(asked)
        prompts = self._prompts(asked)
        if len(prompts) * asked.n > self.most_answers:
            raise RefusedField("n", f"n: asks for {len(prompts) * asked.n} answers, at most {self.most_answers}")
        return [request for prompt, ids in prompts for request in self._plan(asked, settings, prompt, ids)]

    def settings(self, asked: Asked) -> Settings:
        """How a request has its answers decoded. Raises RefusedField for what cannot be honoured."""
        name = self._method_name(asked)
        method = None if name is None else self.methods[name]
        most = self.max_new_tokens if asked.most_tokens is None else asked.most_tokens
        if most > self.max_new_tokens:
            raise RefusedField("max_tokens", f"max_tokens: got {most}, at most {self.max_new_tokens} here")
        is_guided = method is not None and method.guided
        for field in () if is_guided else ("weight", "guide", "gate_entropy", "preference"):
            if getattr(asked, field) is not None:
                raise RefusedField(field, f"{field}: needs a guided method, one of {', '.join(self.models[1:]) or '-'}")
        for field, reason in ({} if method is None else method.unused).items():
            # Every method here can be asked for a nucleus.
            if field not in ("look_ahead", "top_p") and getattr(asked, field, None) is not None:
                raise RefusedField(field, f"{field}: is not an option of {name}, which {reason}")
        if asked.k is not None and self.limits.k is None:
            raise RefusedField("k", "k: is not supported here, where all tokens are candidates; leave it out")
        usual = self._usual_preference
        if asked.preference is not None and (usual is None or len(asked.preference) != len(usual)):
            wanted = "no preference" if usual is None else f"{len(usual)} numbers"
            raise RefusedField(
                "preference", f"preference: got {len(asked.preference)} numbers, this server takes {wanted}"
            )
        draws = "sample" if method is None else method.draws
        temperature = 0.0 if draws == "greedy" else asked.temperature
        if temperature is None:
            temperature = 1.0 if method is None else method.temperature
        whole_vocabulary = not is_guided and asked.k is None and name in (None, "top_p")
        keeps_rest = whole_vocabulary or (is_guided and method.keeps_rest)
        top_p = asked.top_p or (1.0 if method is None else method.top_p)
        shape = OwnShape(top_p, keeps_rest, self._bias(asked), asked.presence_penalty, asked.frequency_penalty)
        settings = self._plain(temperature, secrets.randbelow(LARGEST_SEED) if asked.seed is None else asked.seed)
        wants_candidates = asked.alternatives is not None or asked.return_trace or asked.stream_trace
        return _refusing(
            "preference",
            dataclasses.replace,
            settings,
            weights=self._weights(asked, method) if is_guided else settings.weights,
            k=self._k(asked, method) if self.limits.k is not None and not whole_vocabulary else settings.k,
            max_new_tokens=most,
            n=1 if temperature == 0 else asked.n,
            gate_entropy=asked.gate_entropy,
            preference=tuple(asked.preference or settings.preference),
            stop=asked.stops,
            shape=shape,
            **self._recorded(wants_candidates),
        )

    def _recorded(self, wants_candidates: bool) -> dict[str, Any]:
        """The settings of what is recorded of an answer's tokens."""
        return {} if wants_candidates else {"trace": None, "alternatives": 0}

    def _plain(self, temperature: float, seed: int) -> Settings:
        """The settings of the language model itself."""
        return dataclasses.replace(
            self.limits,
            weights=(0.0,) * len(self.guides),
            temperature=temperature,
            seed=seed,
            preference=self._usual_preference or (),
        )

    @property
    def _usual_preference(self) -> tuple[float, ...] | None:
        if self.method.reward_model != "preference":
            return None
        objectives = self.session.reward_models[0].model.lora.objectives
        return (1 / objectives,) * objectives

    def _most_candidates(self, k: int | None) -> int | None:
        """The most candidates of a step; None where the whole vocabulary is scored."""
        method = self.method
        if not method.guided:
            return k or UNGUIDED_K
        scores_all = all(model.role != "scalar" for model in self.session.reward_models)
        is_whole = k is None and method.candidates == "all" and scores_all
        return None if is_whole or (k is None and "k" in method.unused) else k or method.k

    def _is_served(self, method: Method) -> bool:
        """Whether rows of the running batch can be decoded by a method."""
        if method.search or method.draws == "contrastive" or method.reward_model == "look_ahead":
            return False
        if method is self.method:
            return True
        own = self.method
        if not method.guided:
            return method.candidates == "top_p" or self.limits.k is not None or method.draws == "greedy"
        try:
            check_roles(method, self.session.reward_models)
            count_guides(method, len(self.session.reward_models))
        except InputError:
            return False
        return (
            own.guided
            and (method.reward_model == "ratio") == (own.reward_model == "ratio")
            and (method.reward_form, method.keeps_rest) == (own.reward_form, own.keeps_rest)
            and self._proposer(method) is self._proposer(own)
        )

    def _proposer(self, method: Method) -> type:
        scores_all = all(model.role != "scalar" for model in self.session.reward_models)
        return type(method.proposer(self.limits.k, scores_vocabulary=scores_all))

    def _method_name(self, asked: Asked) -> str | None:
        """The method that a request asks for; None for the language model itself."""
        if asked.model not in self.models:
            raise RefusedField(
                "model",
                f"model {asked.model!r} is not served; choose one of {', '.join(self.models)}",
                "model_not_found",
            )
        preset = asked.model.removeprefix(self.name).removeprefix("+") or None
        if asked.method is None and preset is None and self.method.guided:
            wants_guidance = any(each is not None for each in (asked.weight, asked.guide, asked.gate_entropy))
            preset = next(name for name, each in METHODS.items() if each is self.method) if wants_guidance else None
        name = asked.method or preset
        if name is not None and name not in self.methods:
            raise RefusedField("method", f"method {name!r} is not served; choose one of {', '.join(self.methods)}")
        return name

    def _weights(self, asked: Asked, method: Method) -> tuple[float, ...]:
        """A weight for each guide; 0 for those that are not asked for."""
        wanted = [asked.guide] if isinstance(asked.guide, str) else asked.guide or self.guides
        for name in wanted:
            if name not in self.guides:
                raise RefusedField("guide", f"guide {name!r} is not here; choose among {', '.join(self.guides)}")
        if len(set(wanted)) < len(wanted):
            raise RefusedField("guide", "guide: names a guide twice")
        given = asked.weight if isinstance(asked.weight, list) else [asked.weight] * len(wanted)
        if len(given) != len(wanted):
            raise RefusedField("weight", f"weight: got {len(given)} weights for {len(wanted)} guides")
        weights = {n: method.weight if w is None else w for n, w in zip(wanted, given, strict=True)}
        return tuple(weights.get(name, 0.0) for name in self.guides)

    def _k(self, asked: Asked, method: Method | None) -> int:
        k = asked.k or (self.limits.k if method is None else min(method.k, self.limits.k))
        if k > self.limits.k:
            raise RefusedField("k", f"k: got {k}, at most {self.limits.k} here")
        return k

    def _bias(self, asked: Asked) -> tuple[tuple[int, float], ...]:
        size = self.session.lm_vocab_size
        biases = []
        for token, bias in (asked.logit_bias or {}).items():
            if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < size):
                raise RefusedField("logit_bias", f"logit_bias: {token[:20]!r} is not a token from 0 to {size - 1}")
            biases.append((int(token), bias))
        try:
            return OwnShape(bias=tuple(biases)).bias
        except InputError as error:
            raise RefusedField("logit_bias", str(error)) from error

    def _prompts(self, asked: Asked) -> list[tuple[Prompt, list[int]]]:
        """The prompts and their tokens."""
        tokenizer = self.session.tokenizer
        if isinstance(asked, Chat):
            turns = [
                {"role": "system" if turn.role == "developer" else turn.role, "content": turn.text}
                for turn in asked.messages
            ]
            text = _refusing("messages", self.form.render, turns, tokenizer)
            prompt = Prompt(asked.id, text, self.form.turns_of(turns, tokenizer))
            return [(prompt, tokenizer.encode_prompt(text))]
        assert isinstance(asked, Completion)
        given = asked.prompt
        is_one = isinstance(given, str) or isinstance(given[0], int)
        found = []
        for number, each in enumerate([given] if is_one else given):
            ids = tokenizer.encode_prompt(each) if isinstance(each, str) else each
            text = each if isinstance(each, str) else tokenizer.decode(each)
            name = asked.id if is_one else f"{asked.id}/{number}"
            found.append((Prompt(name, text), ids))
        return found

    def _plan(self, asked: Asked, settings: Settings, prompt: Prompt, ids: list[int]) -> list[Request]:
        param = "messages" if isinstance(asked, Chat) else "prompt"
        begun = asked.begin_with or []
        if not ids + begun:
            raise RefusedField(param, f"{param}: is empty, and this model has no token to begin with")
        if max(ids + begun) >= self.session.lm_vocab_size:
            raise RefusedField(param, f"{param}: has tokens outside of the model's vocabulary")
        self._check_length(param, len(ids + begun))
        session = self.session
        planned = _refusing(param, session.plan, [prompt], dataclasses.replace(settings, n=asked.n), [ids])
        if begun:
            text = session.tokenizer.decode_answer(ids, begun)
            planned = [
                request._replace(
                    lm_ids=ids + begun,
                    own_ids=[
                        own + (begun if model.retokeniser is None else model.tokenizer.encode_answer(text))
                        for model, own in zip(session.reward_models, request.own_ids, strict=True)
                    ],
                )
                for request in planned
            ]
        self._check_length(param, max(map(len, planned[0].own_ids), default=0))
        return [request._replace(settings=settings) for request in planned]

    def _check_length(self, param: str, tokens: int) -> None:
        if tokens > self.max_prompt_tokens:
            raise RefusedField(
                param, f"{param}: has {tokens} tokens, at most {self.max_prompt_tokens} here", "context_length_exceeded"
            )


def _names(sources: Sequence[str]) -> list[str]:
    """A short name for each source: the last part of its path that tells it apart."""
    short = [source.rstrip("/").removesuffix("/model").rpartition("/")[2] for source in sources]
    return [name if short.count(name) == 1 else source for name, source in zip(short, sources, strict=True)]


def _refusing(param: str, make: Callable[..., T], *given: Any, **named: Any) -> T:
    """What `make` makes; its InputError names the field."""
    try:
        return make(*given, **named)
    except InputError as error:
        raise RefusedField(param, f"{param}: {error}") from error
