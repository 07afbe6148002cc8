"""Puts and deletes through etcd's own JSON gateway (https://etcd.io/docs/v3.5/dev-guide/api_grpc_gateway/).

Enough to play backends that come and go, and none of the code that is measured.
"""

from __future__ import annotations

import http.client
import json
from base64 import b64encode
from urllib.parse import urlsplit

from benchmarks.processes import Failed


class Etcd:
    """One keep-alive connection; for one thread."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)

    def put(self, key: str, value: str) -> None:
        self._ask("/v3/kv/put", {"key": _encoded(key), "value": _encoded(value)})

    def delete(self, key: str) -> None:
        self._ask("/v3/kv/deleterange", {"key": _encoded(key)})

    def _ask(self, path: str, question: dict[str, str]) -> None:
        try:
            self._connection.request("POST", path, json.dumps(question))
            answer = self._connection.getresponse()
            body = answer.read()
        except OSError as error:
            raise Failed(f"etcd does not answer: {error}") from error
        if answer.status != 200:
            raise Failed(f"etcd answers {answer.status}: {body[:200].decode('ascii', 'replace')}")


def _encoded(text: str) -> str:
    return b64encode(text.encode()).decode()
