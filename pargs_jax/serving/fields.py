"""The fields of a request, in the form of OpenAI's, and those that set its guidance.

A field that is not here is refused by name; so is a value that would not be honoured.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from pargs_jax.config import LARGEST_SEED
from pargs_jax.errors import InputError

MOST_STOPS = 4
MOST_ALTERNATIVES = 20
"""The most alternatives of a token that a request may ask for."""

Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Weight = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
Token = Annotated[int, Field(ge=0, lt=2**31)]


class RefusedField(InputError):
    """A field that cannot be honoured; `param` is its name, and `code` says what is wrong with it."""

    def __init__(self, param: str | None, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Fields):
    """`include_usage` asks for one more chunk, with the numbers of tokens."""

    include_usage: bool = False


class TextPart(_Fields):
    """A part of a turn's content."""

    type: Literal["text"]
    text: str


class Message(_Fields):
    """A turn. `developer` is another word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(_Fields):
    """Only text can be asked for."""

    type: Literal["text"]


class Asked(_Fields):
    """What completions and chat have in common. The second half sets the guidance (docs/serving.md)."""

    model: Name
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] = 0.0
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    user: Annotated[str, StringConstraints(max_length=200)] | None = None

    method: Name | None = None
    guide: Name | Annotated[list[Name], Field(min_length=1, max_length=16)] | None = None
    weight: Weight | Annotated[list[Weight], Field(min_length=1, max_length=16)] | None = None
    k: Annotated[int, Field(ge=1)] | None = None
    gate_entropy: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] | None = None
    preference: Annotated[list[Weight], Field(min_length=1, max_length=16)] | None = None
    id: Name = "0"
    begin_with: Annotated[list[Token], Field(max_length=100_000)] | None = None
    return_trace: bool = False
    stream_trace: bool = False

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def most_tokens(self) -> int | None:
        """The longest answer, in tokens; None for the server's."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many alternatives of each token are asked for; None where the tokens themselves are not."""
        return None


class Completion(Asked):
    """The body of `/v1/completions`."""

    prompt: str | Annotated[list[str] | list[Token] | list[list[Token]], Field(min_length=1, max_length=100_000)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] = False

    @property
    def most_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


class Chat(Asked):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    response_format: ResponseFormat | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def read_fields(kind: type[Asked], body: Any) -> Any:
    """The fields of a request's body, which is parsed JSON. A null counts as not given.

    Raises RefusedField for the first field that is wrong or not supported.
    """
    if not isinstance(body, dict):
        raise RefusedField(None, "the body must be a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    try:
        asked = kind.model_validate(given)
    except ValidationError as error:
        # Of the alternatives of a field, the one whose type is right says most.
        every = error.errors(include_url=False, include_input=False)
        same = [each for each in every if each["loc"][:1] == every[0]["loc"][:1]]
        first = max(same, key=lambda each: (not each["type"].endswith("_type"), len(each["loc"])))
        param = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in _NAMES)
        name = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            path = ".".join(map(str, first["loc"]))[:100]
            raise RefusedField(path, f"{path!r} is not supported by this server", "unsupported_parameter") from None
        if name in ("echo", "best_of", "response_format"):
            raise RefusedField(name, f"{name!r}: this value is not supported; leave it out") from None
        raise RefusedField(param or name, f"{param or name}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None
    if isinstance(asked, Chat):
        if asked.top_logprobs and not asked.logprobs:
            raise RefusedField("top_logprobs", "top_logprobs: needs logprobs: true")
        if asked.max_tokens and asked.max_completion_tokens and asked.max_tokens != asked.max_completion_tokens:
            raise RefusedField("max_tokens", "max_tokens and max_completion_tokens: got two numbers, give only one")
    for name in ("stream_options", "stream_trace"):
        if getattr(asked, name) and not asked.stream:
            raise RefusedField(name, f"{name}: needs stream: true")
    return asked


_NAMES = {*Completion.model_fields, *Chat.model_fields, *Message.model_fields, *TextPart.model_fields, "include_usage"}
"""The words in an error's location that are fields; others are names of types."""
