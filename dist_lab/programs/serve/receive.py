"""Reading a request from a client that may be slow, huge, or not what it says.

    413    more than LARGEST_BODY bytes
    408    the body takes longer than SLOWEST seconds
    415    a body that is not application/json
    421    a Host that is not this server's, where it is bound to this machine

The last two are for browsers. A page of another site can post text to 127.0.0.1, but JSON only
after a question that we do not answer; and with a name that leads to 127.0.0.1 it could even read
the answer, but it cannot change the header Host.
"""

import asyncio
from collections.abc import Collection

from starlette.requests import ClientDisconnect, Request

from dist_lab.errors import shown
from dist_lab.programs.serve.refused import Refused

LARGEST_BODY = 2**20  # bytes
MOST_READ = 2**24  # read, and forgotten: who is still sending when we close does not see our answer
SLOWEST = 10.0  # seconds
LOCAL = ("127.0.0.1", "localhost", "[::1]")


async def read_body(request: Request) -> bytes:
    """Returns the body of a request.

    Raises:
        Refused: it is too large, too slow, no JSON, or its client has gone.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise Refused(
            415, f"the body is of type {shown(kind)}; send it with the header content-type: "
            "application/json",
        )  # fmt: skip
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > MOST_READ:
        raise too_large()
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(SLOWEST):
            async for chunk in request.stream():
                size += len(chunk)
                if size > MOST_READ:
                    raise too_large()
                if size <= LARGEST_BODY:
                    body += chunk
    except TimeoutError:
        raise Refused(
            408, f"of the body only {size:,} bytes came within {SLOWEST:g} s; send it at once"
        ) from None
    except ClientDisconnect:
        raise Refused(400, "the body ends too early") from None  # nobody reads this
    if size > LARGEST_BODY:
        raise too_large()
    return bytes(body)


def too_large() -> Refused:
    return Refused(413, f"the body has more than {LARGEST_BODY:,} bytes; send a shorter prompt")


def check_host(header: str, names: Collection[str]) -> None:
    """Raises Refused unless the header Host, with or without a port, is one of these names."""
    name, colon, port = header.rpartition(":")
    host = name if colon and port.isdecimal() else header
    if host not in names:
        raise Refused(
            421, f"host {shown(host)} is not this server, which is for its own machine alone; ask "
            "127.0.0.1, or start it with --host 0.0.0.0",
        )  # fmt: skip
