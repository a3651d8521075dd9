"""What travels between workers, counted twice: at the process group, and at the sockets.

At the process group: what each collective must bring to this worker, read off the tensors that it
is given. At the sockets: what Linux says that the TCP connections of this process have received,
with the transport's own headers of messages, retries of its algorithm and all.

Dimensions: W workers.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# `tcpi_bytes_received` of Linux's struct tcp_info (linux/tcp.h, since 4.1).
_TCP_INFO, _RECEIVED = 11, 128


class CountedLinks(TorchDispatchMode):
    """Bytes that this worker has to receive, by collective.

    Gathers and scatters: all but the own part moves. An all-reduce is a scatter and a gather of the
    sums, which is the least that is possible.

    Args:
        num_workers: W.
    """

    def __init__(self, num_workers: int) -> None:
        super().__init__()
        self.num_workers = num_workers
        self.received: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then call."""
        name = func.name()
        if name.startswith("c10d::"):
            sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            moved = moved_bytes(name, sizes, self.num_workers)
            short = name.removeprefix("c10d::").strip("_")
            self.received[short] = self.received.get(short, 0) + moved
        return func(*args, **(kwargs or {}))


def moved_bytes(name: str, sizes: list[int], num_workers: int) -> int:
    """What one collective brings to a worker.

    Args:
        name: of the operation.
        sizes: bytes of its tensors.
        num_workers: W.
    """
    if not sizes or "barrier" in name:
        return 0
    if "alltoall" in name:
        return sizes[0] * (num_workers - 1) // num_workers
    if "allreduce" in name:
        return 2 * sum(sizes) * (num_workers - 1) // num_workers
    # Gathering into the large one, or scattering the sum of it.
    return max(sizes) - min(sizes) if len(sizes) == 2 else sum(sizes) - 2 * min(sizes)


def socket_bytes() -> int | None:
    """Bytes that the TCP connections of this process have received so far; None but on Linux."""
    if sys.platform != "linux":
        return None
    total = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry))) as one:
                if one.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                if one.type != socket.SOCK_STREAM:
                    continue
                info = one.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 256)
        except OSError:
            continue  # Closed meanwhile, or none of TCP.
        if len(info) >= _RECEIVED + 8:
            total += struct.unpack_from("=Q", info, _RECEIVED)[0]
    return total
