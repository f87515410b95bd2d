"""A request that is refused, or that fails later: what its client is told."""

from typing import Any

TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class Refused(Exception):
    """A request gets an error.

    Args:
        status: of HTTP.
        message: one line: what is wrong, with the numbers, and what to send instead.
        param: the field of the request that is wrong.
        code: a word for programs.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def to_dict(self) -> dict[str, Any]:
        """The error in the shape of OpenAI's API."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {
            "error": {
                "message": self.message, "type": kind, "param": self.param, "code": self.code,
            }
        }  # fmt: skip
