"""What all objects in a request have in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

MOST = 64


class Fields(BaseModel):
    """An object of JSON. Its fields are known, and of exactly their types: 1 is no text.

    pydantic makes an error for each field that is wrong. A hostile object has a hundred thousand of
    them, and nobody else would be served meanwhile. So there is a limit, and lists are checked up
    to their first mistake (`fail_fast`).
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _are_few(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MOST:
            raise ValueError(f"it has {len(value):,} fields, and {MOST} are allowed")
        return value
