"""A network link with a given bandwidth and delay, between two network namespaces on this machine.

Each end is a TUN device in a namespace of its own, and one process carries the packets from one to the other as a wire
of that bandwidth and length would: they queue, they take their time to be sent, then their time to travel. So both
ends run the kernel's own TCP, and anything that uses sockets can be measured unchanged. (`tc` alone cannot do it on a
kernel without netem.) Needs root and /dev/net/tun. The namespaces go with the processes in them.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from broker.process.lifecycle import ErgonError
from tests.bench.weightchannel.workers import Worker

TUN = Path("/dev/net/tun")
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
OFFLOADS = 0x01 | 0x02  # checksums and TCP segments are left to the device, as with any network card
CLONE_NEWNET = 0x40000000
VNET = struct.Struct("<BBHHHH")  # flags, kind of segmentation, header bytes, segment bytes, 2 of the checksum
FRAMING_BYTES = 38  # of Ethernet for each packet on the wire: preamble, header, checksum, gap
MAX_READ_BYTES = 1 << 17
QUEUE_S = 0.05  # of sending at full rate: what a packet may find queued before it without being dropped
DEVICE = "link0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
SOCKET_BUFFER = "4096 131072 33554432"  # so that one connection can fill the link


def obstacle() -> str | None:
    """Why there can be no link here, or None."""
    if os.geteuid() != 0 or not TUN.exists():
        return "shaped links need root and /dev/net/tun"
    return None


class ShapedLink:
    """Two namespaces and what is between them. `delay_s`: in each direction, so a round trip takes twice as long."""

    def __init__(self, bits_per_s: float, delay_s: float) -> None:
        self._sides = [ThreadPoolExecutor(1, initializer=_new_namespace) for _ in ADDRESSES]
        try:
            fds = [side.submit(_open_end, i).result() for i, side in enumerate(self._sides)]
        except (OSError, subprocess.CalledProcessError) as error:
            raise ErgonError(f"no network namespace with a TUN device can be made here ({error})") from error
        command = [sys.executable, "-m", "tests.bench.weightchannel.link", *map(str, (*fds, bits_per_s, delay_s))]
        self._carrier = subprocess.Popen(command, pass_fds=fds)
        for fd in fds:
            os.close(fd)

    def start(self, side: int, name: str) -> Worker:
        """A worker in the namespace of side 0 or 1, whose address is that of ADDRESSES."""
        return self._sides[side].submit(Worker, name).result()

    def run(self, side: int, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Any other process there."""
        return self._sides[side].submit(subprocess.Popen, command, env=environment).result()

    def close(self) -> None:
        """Cut the link."""
        self._carrier.kill()
        self._carrier.wait()
        for side in self._sides:
            side.shutdown()


def _new_namespace() -> None:
    """Give this thread, and what it starts, a network of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")


def _open_end(side: int) -> int:
    """This thread's end of the link: the file descriptor of its device."""
    fd = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), flags))
    fcntl.ioctl(fd, TUNSETOFFLOAD, OFFLOADS)
    here, there = ADDRESSES[side], ADDRESSES[1 - side]
    for words in (
        "link set lo up",
        f"addr add {here} peer {there} dev {DEVICE}",
        f"link set {DEVICE} mtu 1500 txqueuelen 10000 up",
    ):
        subprocess.run(["ip", *words.split()], check=True)
    for name in ("tcp_rmem", "tcp_wmem"):
        subprocess.run(["sysctl", "-qw", f"net.ipv4.{name}={SOCKET_BUFFER}"], check=True)
    return fd


class _Direction:
    """Packets on their way from one device to the other."""

    def __init__(self, source: int, target: int, bits_per_s: float, delay_s: float) -> None:
        self.source, self._target = source, target
        self._seconds_per_byte, self._delay_s = 8 / bits_per_s, delay_s
        self._free_at = 0.0  # when the wire has sent all that was accepted
        self._packets: deque[tuple[float, bytes]] = deque()

    @property
    def next_arrival(self) -> float:
        """When the next packet arrives; infinite where none is on its way."""
        return self._packets[0][0] if self._packets else float("inf")

    def take(self) -> None:
        """Accept or drop what was sent. Several segments of one connection come as one, and count as several."""
        while True:
            try:
                packet = os.read(self.source, MAX_READ_BYTES)
            except BlockingIOError:
                return
            now = time.monotonic()
            starts = max(self._free_at, now)
            if starts - now > QUEUE_S:
                continue
            _, kind, header_bytes, segment_bytes, _, _ = VNET.unpack_from(packet)
            num_bytes = len(packet) - VNET.size
            segments = -(-(num_bytes - header_bytes) // segment_bytes) if kind else 1
            on_the_wire = num_bytes + (segments - 1) * header_bytes + segments * FRAMING_BYTES
            self._free_at = starts + on_the_wire * self._seconds_per_byte
            self._packets.append((self._free_at + self._delay_s, packet))

    def deliver(self, now: float) -> None:
        """Hand over what has arrived."""
        while self._packets and self._packets[0][0] <= now:
            try:
                os.write(self._target, self._packets.popleft()[1])
            except OSError:  # the other end's device is gone or full: a wire loses it, too
                return


def carry(first: int, second: int, bits_per_s: float, delay_s: float) -> None:
    """Be the wire, for ever."""
    ways = [_Direction(first, second, bits_per_s, delay_s), _Direction(second, first, bits_per_s, delay_s)]
    while True:
        now = time.monotonic()
        for way in ways:
            way.deliver(now)
        pause_s = min(way.next_arrival for way in ways) - time.monotonic()
        ready, _, _ = select.select([first, second], [], [], min(max(pause_s, 0.0), 1.0))
        for way in ways:
            if way.source in ready:
                way.take()


if __name__ == "__main__":
    carry(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
