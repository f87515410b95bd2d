"""Bytes that the sockets of this process have sent, by the kernel's own count.

A ledger knows what our code hands over, and nothing of what a library sends by itself. The kernel
knows every TCP socket: the payload of its stream, each byte once, with the few that the transport
puts before a message and without the headers of packets. Only Linux tells.
"""

import os
import socket
import struct
import sys

# The two fields of struct tcp_info (include/uapi/linux/tcp.h) that are read, as byte offsets.
BYTES_SENT, BYTES_RETRANSMITTED = 200, 208  # u64, since Linux 4.19
LENGTH = 216


def sent_bytes() -> int | None:
    """Payload bytes sent so far on the TCP sockets that are open now; None where nobody counts.

    A byte counts once it has left; what still waits in a send buffer does not. So read it when
    the peers have what they were sent.
    """
    if sys.platform != "linux":
        return None
    total = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                continue
            duplicate = os.dup(int(number))
        except OSError:  # the one that listed them, or closed by another thread
            continue
        with socket.socket(fileno=duplicate) as found:
            if found.type != socket.SOCK_STREAM or found.family not in INTERNET:
                continue
            info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, LENGTH)
            if len(info) < LENGTH:
                return None
            total += _field(info, BYTES_SENT) - _field(info, BYTES_RETRANSMITTED)
    return total


INTERNET = (socket.AF_INET, socket.AF_INET6)


def _field(info: bytes, offset: int) -> int:
    value: int = struct.unpack_from("=Q", info, offset)[0]
    return value
