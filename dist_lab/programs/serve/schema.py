"""Requests in the format of OpenAI's API, checked field by field.

A field that we do not know is an error, and so is one whose effect we do not have: a client that
asks for `logprobs` and gets none would take the silence for an answer. Fields without effect here
are accepted with the value that means "off", because many clients send all of them.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError
from pydantic_core import ErrorDetails, from_json

from dist_lab.errors import nearest_word, printable, shown
from dist_lab.programs.serve.chat import Message
from dist_lab.programs.serve.fields import Fields
from dist_lab.programs.serve.refused import Refused
from dist_lab.programs.serve.router import Asked

MOST_TEXTS = 16  # of one request
MOST_STOPS = 4  # as OpenAI has it: each is looked for after every token
OFF = {  # field that we do not have -> its values that mean "off"
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "parallel_tool_calls": (False, True),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}

Short = Annotated[str, Field(min_length=1, max_length=256)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Few = Field(min_length=1, max_length=MOST_TEXTS, fail_fast=True)
T = TypeVar("T", bound="Common")


class StreamOptions(Fields):
    """What to send at the end of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Common(Fields):
    """The fields that both kinds of request have; `null` is as if the field were not there."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None  # not of OpenAI
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_TEXTS)] | None = None
    stop: Short | Annotated[list[Short], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # who asks: for the server's owner, who does not ask here
    metadata: Any = None  # the same

    DEFAULT_TOKENS: ClassVar[int] = 16

    @property
    def new_tokens(self) -> int:
        return self.max_tokens or self.DEFAULT_TOKENS

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def of(self, prompt: str | list[int], drawn_seed: int, stops: Sequence[str] = ()) -> Asked:
        """The `n` texts of a prompt, each with a seed of its own: seed, seed + 1, ...

        Args:
            drawn_seed: where the request has none.
            stops: besides its own.
        """
        first = drawn_seed if self.seed is None else self.seed
        sampling = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_k": self.top_k,
            "top_p": 1.0 if self.top_p is None else self.top_p,
        }
        seeds = [first + number for number in range(self.n or 1)]
        return Asked(prompt, self.new_tokens, sampling, seeds, [*self.stops, *stops])


class CompletionRequest(Common):
    """A request to /v1/completions."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Tokens
        | Annotated[list[Annotated[str, Field(min_length=1)]], Few]
        | Annotated[list[Tokens], Few]
    )

    @property
    def prompts(self) -> list[Any]:
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return list(self.prompt) if several else [self.prompt]


class ChatRequest(Common):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None

    DEFAULT_TOKENS: ClassVar[int] = 256

    @property
    def new_tokens(self) -> int:
        return self.max_completion_tokens or self.max_tokens or self.DEFAULT_TOKENS


def parse(body: bytes, kind: type[T], model: str) -> T:
    """Returns the request in a body.

    Raises:
        Refused: it is no JSON, a field is unknown or wrong, or it asks for another model.
    """
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Refused(400, f"the body is no JSON: {error}; send a JSON object") from None
    if not isinstance(fields, dict):
        raise Refused(400, "the body is no JSON object; send {...} with the fields of a request")
    try:
        asked = kind.model_validate(without_off(fields))
    except ValidationError as error:
        raise wrong_field(error.errors(include_url=False)[0], kind) from None
    if asked.model not in (None, model):
        raise Refused(
            404, f"there is no model {shown(asked.model)} here; give {shown(model)}, or leave "
            "model out", "model", "model_not_found",
        )  # fmt: skip
    if isinstance(asked, CompletionRequest) and len(asked.prompts) * (asked.n or 1) > MOST_TEXTS:
        raise Refused(
            400, f"{len(asked.prompts)} prompts with n {asked.n} are {len(asked.prompts)} x "
            f"{asked.n} texts, and {MOST_TEXTS} are allowed; send several requests", "n",
        )  # fmt: skip
    return asked


def without_off(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without those that are off. Raises Refused if one is on, and we do not have it."""
    for name in fields.keys() & OFF.keys():
        value, off = fields[name], (None, *OFF[name])
        if not any(same(value, one) for one in off):
            raise Refused(
                400, f"{name} {shown(value)} has no effect on this server, which does not have it; "
                f"leave {name} out", name, "unsupported_parameter",
            )  # fmt: skip
    return {name: value for name, value in fields.items() if name not in OFF}


def same(value: Any, other: Any) -> bool:
    """Whether two values of JSON are the same; in Python 0 == False."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def wrong_field(error: ErrorDetails, kind: type[BaseModel]) -> Refused:
    """The error of the first field that is wrong."""
    if not error["loc"]:
        return Refused(400, f"the request is wrong: {message_of(error)}")
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden" and len(error["loc"]) == 1:
        near = nearest_word(name, kind.model_fields)
        hint = f"did you mean {near}?" if near else f"leave it out, or see {API}"
        return Refused(400, f"there is no field {shown(name)}; {hint}", where(error))
    if error["type"] == "missing":
        return Refused(400, f"{where(error)} is missing; see {API}", where(error))
    last = where(error).rpartition(".")[2]
    what = FORMS.get(last) or message_of(error)
    problem = f"{where(error)} cannot be {shown(error['input'])}: {what}"
    return Refused(400, problem, where(error))


def message_of(error: ErrorDetails) -> str:
    text = error["msg"].removeprefix("Value error, ")
    return text[0].lower() + text[1:]


API = "dist_lab/programs/serve/README.md"
FORMS = {  # of the fields that have several
    "prompt": f"give a text, a list of tokens, or a list of at most {MOST_TEXTS} of either, and "
    "none that is empty",
    "stop": f"give a text of 1 to 256 characters, or a list of at most {MOST_STOPS} of them",
    "content": 'give a text, or a list of {"type": "text", "text": ...}',
}


def where(error: ErrorDetails) -> str:
    """The place in the request, such as messages[2].role, in at most 80 characters."""
    steps = error["loc"]
    for index, step in enumerate(steps):
        if step in FORMS:  # what follows is one of its forms, and where that is wrong
            steps = steps[: index + 1]
            break
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return printable(text[1:81])
