"""Who calls: an issuer with one RS256 key of 2048 bits, and a token for each consumer that the workloads know."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass

from policies import identity

ISSUER = "https://bench.localhost"  # a name, never fetched
AUDIENCE = "weir"
TTL_SECONDS = 86_400


@dataclass(frozen=True, slots=True)
class Credentials:
    """The public keys as JWKS, and what signs."""

    jwks: bytes
    key: bytes

    @classmethod
    def make(cls) -> Credentials:
        key = subprocess.run(
            ["openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"],
            check=True,
            capture_output=True,
        ).stdout
        return cls(identity.jwks_of(key), key)

    def token(self, consumer: str) -> str:
        return identity.mint(
            self.key, sub=consumer, issuer=ISSUER, audience=AUDIENCE, ttl=TTL_SECONDS, wall=time.time()
        )
