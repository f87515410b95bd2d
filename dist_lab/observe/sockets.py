"""Bytes that the sockets of this process have sent, counted by the kernel.

A ledger counts the bytes of our own collectives, but not those that a library sends by itself. The
kernel counts the payload of every TCP socket, each byte once. This includes the few bytes that the
transport puts before a message, and excludes packet headers. Only Linux has these counters.
"""

import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator

# In struct tcp_info (include/uapi/linux/tcp.h): the offset of tcpi_bytes_sent, which
# tcpi_bytes_retrans follows (both u64, since Linux 4.19), and the offset of their end.
OFFSET, LENGTH = 200, 216


def sent_bytes() -> int | None:
    """Returns the payload bytes sent so far on the TCP sockets that are open now. None if unknown.

    Bytes in a send buffer do not count until they leave. So call it after the peers have received
    their messages.
    """
    if sys.platform != "linux":
        return None
    total = 0
    for _, connection in tcp_sockets():
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, LENGTH)
        if len(info) < LENGTH:
            return None
        sent, sent_again = struct.unpack_from("=2Q", info, OFFSET)
        total += sent - sent_again
    return total


def tcp_sockets() -> Iterator[tuple[int, socket.socket]]:
    """Yields each TCP descriptor with a duplicate, which can be closed without closing it."""
    for name in os.listdir("/dev/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            duplicate = os.dup(int(name))
        except OSError:  # the descriptor of this listing, or one that another thread has closed
            continue
        with socket.socket(fileno=duplicate) as connection:
            if connection.type == socket.SOCK_STREAM and connection.family in INTERNET:
                yield int(name), connection


INTERNET = (socket.AF_INET, socket.AF_INET6)
