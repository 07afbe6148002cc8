"""What `weir up` keeps in its folder (`.weir/`): a signing key, a policy, a weir.yaml, data and logs of its children.

The key, the policy and weir.yaml are written when they are missing and are then the user's: nothing here overwrites
them. jwks.json is the public half of the key and follows it. One `weir up` at a time: the lock ends with its process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from gateway.children import CannotRun
from policies import identity

ISSUER = "https://weir.localhost"  # a name, never fetched: the keys are in jwks.json
AUDIENCE = "weir"
SERVICE = "local"

POLICY = f"""\
# Written once by `weir up`; yours to edit, and in force a second after you save it.
# Check an edit first with: weir policy check policy.yaml
version: 1
issuers:
  - issuer: {ISSUER}
    audience: {AUDIENCE}
    algorithms: [ES256]
    jwks: jwks.json               # beside this file
plans:
  team: {{requests: 100/second, concurrency: 64}}
  free: {{requests: 60/minute, burst: 10, concurrency: 4}}
consumers:                        # first match wins
  - match: {{group: team}}
    plan: team
  - match: {{any: true}}
    plan: free
routes:
  - name: models
    match: {{path: "/v1/*"}}
    to:
      - service: {SERVICE}
  - name: tensors                 # the Open Inference Protocol, also over gRPC
    match: {{path: "/v2/models/*"}}
    to:
      - service: {SERVICE}
"""

CONFIG = """\
# Written once by `weir up`; yours to edit, read at start. `weir up` sets the variables: most ports differ each time.
listen: ${WEIR_LISTEN}
admin:
  listen: ${WEIR_ADMIN}
workers: 1
policy: policy.yaml
discovery:
  etcd:
    endpoints:
      - ${WEIR_ETCD}
"""
REDIS = """\
redis:
  url: ${WEIR_REDIS}
"""


class Home:
    """The folder. Nothing is read or written before `locked` and `prepare`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self.key = self.directory / "signing-key.pem"
        self.jwks = self.directory / "jwks.json"
        self.policy = self.directory / "policy.yaml"
        self.logs = self.directory / "logs"

    def config(self, *, redis: bool) -> Path:
        """The weir.yaml of this kind of start."""
        return self.directory / ("weir.yaml" if redis else "weir-no-redis.yaml")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process, making it if need be. Raises CannotRun when another one holds it."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = (self.directory / "lock").open("w")
        except OSError as error:
            raise CannotRun(
                f"cannot write {self.directory}: {error.strerror}; start it in a folder of yours"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CannotRun(
                    f"another `weir up` runs in {self.directory}; stop it, or start this one in another folder"
                ) from None
            yield

    def prepare(self) -> None:
        """Writes what is missing. Raises CannotRun when the key that is there cannot be used."""
        self.logs.mkdir(exist_ok=True)
        for log in self.logs.glob("*.log"):
            log.replace(log.with_suffix(".log.old"))
        _write_once(self.directory / ".gitignore", "*\n")
        _write_once(self.key, identity.generate_signing_key().decode())
        _write_once(self.policy, POLICY)
        _write_once(self.config(redis=True), CONFIG + REDIS)
        _write_once(self.config(redis=False), CONFIG)
        try:
            self.jwks.write_bytes(identity.jwks_of(self.key.read_bytes()))
        except identity.InvalidKeys as error:
            raise CannotRun(f"{self.key}: {error}; delete it to get a new one") from error


def _write_once(path: Path, text: str) -> None:
    with (
        contextlib.suppress(FileExistsError),
        os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file,
    ):
        file.write(text)
