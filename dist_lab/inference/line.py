"""The line between rank 0 and a router: JSON, one message a line, over a socket of this machine.

    router -> rank 0    {"do": "add", "name": "7", "asked": [{"prompt": "def ", ...}]}
                        {"do": "cancel", "name": "7.0"}
                        {"do": "stop"}
    rank 0 -> router    {"accepted": {}, "refused": {}, "events": [], "counts": {"running": 0, ...}}
                                                    first, when the model is loaded
                        {"accepted": {"7": [4]}, "refused": {}, "events": [["7.0", "a", ""]],
                         "counts": {"running": 1, ...}}                        after every step
                                                    "", "length", "stop" or "failed": engine.Event

A prompt comes once, with the seeds of all its texts. So a line is about as long as the body of its
request, however many texts are asked for. JSON cannot make the reader run code, as pickle can, and
a line that is longer than LARGEST is an error before it fills the memory. Does not import torch.
"""

import json
import socket
from collections.abc import Mapping
from typing import Any

from dist_lab.errors import MachineError

LARGEST = 2**23  # bytes of a line; a router refuses requests that are far smaller


class Line:
    """Rank 0's end of the line."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._rest = connection, b""

    def receive(self, wait: float) -> bytes:
        """Returns all whole lines that have come, maybe none.

        Args:
            wait: for the first byte, so many seconds; 0: take what is there.

        Raises:
            MachineError: the router has ended, or a line is too long.
        """
        self._socket.settimeout(wait)
        try:
            data = self._socket.recv(2**20)
        except (BlockingIOError, TimeoutError):
            return b""
        if not data:
            raise MachineError("the router has ended, and nobody can ask the model")
        self._rest += data
        end = self._rest.rfind(b"\n") + 1
        lines, self._rest = self._rest[:end], self._rest[end:]
        if len(self._rest) > LARGEST:
            raise MachineError(f"a line of the router has more than {LARGEST:,} bytes")
        return lines

    def send(self, message: Mapping[str, Any]) -> None:
        """Raises MachineError if the router has ended."""
        self._socket.settimeout(None)
        try:
            self._socket.sendall(as_line(message))
        except OSError as error:
            raise MachineError(f"the router has ended: {error.strerror}") from error


def as_line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
