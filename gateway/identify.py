"""From an Authorization header to an entry: who is calling, and under which plan.

A verified token is remembered, so that all but its first request are one hash and one lookup (about a microsecond;
checking a signature takes 30 to 120). What is remembered is the SHA-256 of the header, never the token. A memory holds
only while nothing that made it has changed: it ends with the token, with any change of any key set (`generation`),
and with the policy (`use`). Refused tokens are remembered too, shortly, so that a flood of one of them costs little.
Both memories are bounded: the least recently used verified token goes first, and the oldest refusal.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from hashlib import sha256

from gateway.keys import KeyStore
from policies.errors import KeysUnavailable, Unauthenticated
from policies.identity import (
    LEEWAY_SECONDS,
    NOT_ACCEPTED,
    KeysMissing,
    Trusted,
    UnknownKey,
    verify,
)
from policies.policy import ANONYMOUS, Issuer, Plan, Policy, Principal

_NO_TOKEN = "a bearer token is needed: send `Authorization: Bearer TOKEN`"  # noqa: S105  a message
_KEYS_AWAY = "the keys that could prove this token are not available"
_REFUSED_SECONDS = 10.0
_MAX_REFUSED = 10_000


class Entry:
    """A caller under the policy in force. Good while the wall clock shows less than `until`."""

    __slots__ = ("epoch", "plan", "principal", "until")

    def __init__(self, principal: Principal, plan: Plan | None, until: float, epoch: int) -> None:
        self.principal = principal
        self.plan = plan
        self.until = until
        self.epoch = epoch  # of the identifier's memory: entries of an older one no longer hold


class Identifier:
    """Tells who is calling under the policy last given to `use`; until then nobody is accepted."""

    def __init__(self, keys: KeyStore, plan_of: Callable[[Principal], Plan | None], capacity: int = 20_000) -> None:
        self._keys = keys
        self._plan_of = plan_of
        self._capacity = capacity
        self._issuers: tuple[Issuer, ...] = ()
        self._anonymous: Entry | None = None
        self._trusted: dict[str, Trusted] = {}
        self._verified: OrderedDict[bytes, Entry] = OrderedDict()
        self._refused: OrderedDict[bytes, tuple[str, str, float]] = OrderedDict()  # message, check, wall time of it
        self._generation = -1
        self._epoch = 0

    def use(self, policy: Policy) -> None:
        """Follow a new policy: forget everything, because issuers and plans may differ."""
        self._issuers = policy.issuers
        self._anonymous = Entry(ANONYMOUS, self._plan_of(ANONYMOUS), float("inf"), -1) if policy.anonymous else None
        self._forget()

    def still_holds(self, entry: Entry, wall: float) -> bool:
        """Whether an entry that was returned for a token would be returned for the same token again. Does not wait."""
        return entry.epoch == self._epoch and self._generation == self._keys.generation and wall < entry.until

    def identify_nowait(self, authorization: bytes | None, wall: float) -> Entry | None:
        """Return the entry of a caller who is known already. None: `identify` must look. Does not wait or raise."""
        if authorization is None or not self._issuers:  # with no issuer a token says nothing: SDKs send a made-up one
            return self._anonymous
        entry = self._verified.get(digest := sha256(authorization).digest())
        if entry is None or self._generation != self._keys.generation:
            return None
        if wall >= entry.until:
            del self._verified[digest]
            return None
        self._verified.move_to_end(digest)
        return entry

    async def identify(self, authorization: bytes | None, wall: float) -> Entry:
        """Verify the token of a caller whom `identify_nowait` did not know. May wait for keys, never long.

        Raises Unauthenticated, and KeysUnavailable where keys that could prove the token cannot be had now.
        """
        token = _bearer_token(authorization)
        if self._generation != self._keys.generation:
            self._forget()
        digest = sha256(authorization or b"").digest()
        self._refuse_again(digest, wall)
        try:
            principal = verify(token, self._trusted, wall)
        except Unauthenticated as refusal:
            self._remember_refusal(digest, refusal, wall)
            raise
        except (UnknownKey, KeysMissing) as question:
            principal = await self._verify_with_newer_keys(token, question.issuer, wall)
        return self._remember(digest, principal)

    def statistics(self) -> dict[str, int]:
        return {"verified": len(self._verified), "refused": len(self._refused)}

    async def _verify_with_newer_keys(self, token: bytes, issuer: Issuer, wall: float) -> Principal:
        """Try once more after a fetch. What stays unknown is not remembered: the key may be published any moment."""
        await self._keys.refetch(issuer)
        if self._generation != self._keys.generation:
            self._forget()
        try:
            return verify(token, self._trusted, wall)
        except UnknownKey:
            if not self._keys.is_failing(issuer):
                raise Unauthenticated(NOT_ACCEPTED, check="token.unknown_key") from None
        except KeysMissing:
            pass
        raise KeysUnavailable(_KEYS_AWAY, retry_after=1.0)

    def _forget(self) -> None:
        self._epoch += 1
        self._generation = self._keys.generation
        self._trusted = {issuer.issuer: (issuer, self._keys.keys_of(issuer)) for issuer in self._issuers}
        self._verified.clear()
        self._refused.clear()

    def _remember(self, digest: bytes, principal: Principal) -> Entry:
        entry = Entry(principal, self._plan_of(principal), principal.expires_at + LEEWAY_SECONDS, self._epoch)
        self._verified[digest] = entry
        if len(self._verified) > self._capacity:
            self._verified.popitem(last=False)
        return entry

    def _remember_refusal(self, digest: bytes, refusal: Unauthenticated, wall: float) -> None:
        self._refused[digest] = (refusal.message, refusal.check, wall)
        if len(self._refused) > _MAX_REFUSED:
            self._refused.popitem(last=False)

    def _refuse_again(self, digest: bytes, wall: float) -> None:
        """Raise what was raised lately for the same header. A clock that was set back makes a refusal no longer."""
        message, check, since = self._refused.get(digest, ("", "", 0.0))
        if not message:
            return
        if since <= wall < since + _REFUSED_SECONDS:
            raise Unauthenticated(message, check=check)
        del self._refused[digest]


def _bearer_token(authorization: bytes | None) -> bytes:
    """RFC 6750, 2.1. Whether it is one token and no more, the strict form of a token decides."""
    scheme, _, token = (authorization or b"").partition(b" ")
    if scheme.lower() != b"bearer" or not token:
        raise Unauthenticated(_NO_TOKEN, check="token.missing")
    return token.lstrip(b" ")
