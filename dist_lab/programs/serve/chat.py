"""Messages of a chat -> the prompt that the model continues.

A model that was trained on plain text has never seen a chat. It continues what looks like the
transcript of one, if it has learned anything like it:

    You are brief.

    User: What is 2 + 3?
    Assistant: 5
    User: And 2 * 3?
    Assistant:

System messages stand alone, with an empty line after each. The answer ends where the model begins
the user's next turn: "\\nUser:" is a stop string. A message that contains such a line looks like a
turn of its own to the model: the prompt is one text.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from dist_lab.programs.serve.fields import Fields

NAMES = {"user": "User", "assistant": "Assistant"}
STOPS = ["\nUser:"]


class TextPart(Fields):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Fields):
    """One message; its text may come in parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=1000, fail_fast=True)]
    name: str | None = None  # of a participant: the template has no place for it

    @property
    def text(self) -> str:
        parts = self.content
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)


def prompt_of(messages: Sequence[Message]) -> str:
    """
    >>> print(prompt_of([Message(role="system", content="Be brief."),
    ...                  Message(role="user", content=" Hello ")]))
    Be brief.
    <BLANKLINE>
    User: Hello
    Assistant:
    """
    turns = [
        f"{NAMES[message.role]}: {message.text.strip()}\n"
        if message.role in NAMES
        else f"{message.text.strip()}\n\n"
        for message in messages
    ]
    return "".join(turns) + "Assistant:"
