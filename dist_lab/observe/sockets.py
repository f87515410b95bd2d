"""Bytes that the sockets of this process have sent, by the kernel's own count.

A ledger knows what our code hands over, and nothing of what a library sends by itself. The kernel
knows every TCP socket: the payload of its stream, each byte once, with the few that the transport
puts before a message and without the headers of packets. Only Linux tells.
"""

import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator

# Of struct tcp_info (include/uapi/linux/tcp.h), tcpi_bytes_sent and tcpi_bytes_retrans: two u64 in
# a row, since Linux 4.19.
OFFSET, LENGTH = 200, 216


def sent_bytes() -> int | None:
    """Payload bytes sent so far on the TCP sockets that are open now; None where nobody counts.

    A byte counts once it has left; what still waits in a send buffer does not. So read it when
    the peers have what they were sent.
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
    """The descriptor and a duplicate of each: closing that leaves the descriptor to its owner."""
    for name in os.listdir("/dev/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            duplicate = os.dup(int(name))
        except OSError:  # the one that listed them, or closed by another thread
            continue
        with socket.socket(fileno=duplicate) as found:
            if found.type == socket.SOCK_STREAM and found.family in INTERNET:
                yield int(name), found


INTERNET = (socket.AF_INET, socket.AF_INET6)
