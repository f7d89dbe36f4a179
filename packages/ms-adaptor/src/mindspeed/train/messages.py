"""Messages between the command and its ranks: JSON over pipes."""

from __future__ import annotations

import json
import math
from multiprocessing.connection import Connection
from typing import Any


def send(connection: Connection, kind: str, **content: Any) -> None:
    """Sends one message; not-a-number becomes null, which JSON has."""
    clean = {name: _finite(value) for name, value in content.items()}
    connection.send_bytes(json.dumps({"kind": kind, **clean}).encode())


def receive(connection: Connection) -> dict[str, Any]:
    """The next message; raises EOFError when the other side is gone."""
    message: dict[str, Any] = json.loads(connection.recv_bytes())
    return message


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
