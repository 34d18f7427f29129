"""A watch over what a test connects to, starts and opens."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Guard:
    """What was connected to and opened while it was on."""

    def __init__(self):
        self.on, self.connected, self.opened = False, [], []

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
            self.connected.append((event, str(arguments[-1])[:200]))
        elif event in ("open", "os.scandir", "os.listdir") and isinstance(arguments[0], str | bytes | os.PathLike):
            self.opened.append(os.fsdecode(arguments[0]))
        elif event in ("os.system", "subprocess.Popen", "os.exec"):
            self.connected.append((event, str(arguments)[:200]))


GUARD = Guard()
sys.addaudithook(GUARD)  # for good: Python takes no hook back


@contextmanager
def guarded() -> Iterator[None]:
    """Within it nothing may be connected to, no process started, and no file whose name holds `secret` opened."""
    GUARD.connected, GUARD.opened, GUARD.on = [], [], True
    try:
        yield
    finally:
        GUARD.on = False
    assert not GUARD.connected, GUARD.connected
    secrets = [path for path in GUARD.opened if "secret" in Path(path).name]
    assert not secrets, secrets
