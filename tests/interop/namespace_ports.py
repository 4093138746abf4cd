"""Which ports a program listens on, in a network of its own: `python namespace_ports.py PORTS PROGRAM ARGUMENTS...`.

To be run by `unshare --net`.  Prints the ports as JSON once they are `PORTS` (tcp/443,udp/3478), or after a while.
"""

from __future__ import annotations

import fcntl
import json
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

PATIENCE = 30.0
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
LISTENING = {"tcp": "0A", "udp": "07"}


def main() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
    wanted = sorted(sys.argv[1].split(","))
    process = subprocess.Popen(sys.argv[2:])
    deadline = time.monotonic() + PATIENCE
    while (found := ports()) != wanted and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    process.wait()
    print(json.dumps(found))


def ports() -> list[str]:
    """All that anybody listens on here."""
    found = set()
    for protocol, state in LISTENING.items():
        for table in (protocol, f"{protocol}6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == state:
                    found.add(f"{protocol}/{int(columns[1].rpartition(':')[2], 16)}")
    return sorted(found)


if __name__ == "__main__":
    main()
