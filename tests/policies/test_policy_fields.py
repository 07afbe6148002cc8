import pytest
from pydantic import TypeAdapter, ValidationError

from policies import policy_fields as fields
from policies.policy import Balance, BalanceKind

HEADER_X = Balance(BalanceKind.HASH, "x-session")


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (fields.Version, "1", "1"),
        (fields.Algorithm, "ES256", "ES256"),
        (fields.Algorithm, "EdDSA", "EdDSA"),
        (fields.Balance, "round_robin", Balance(BalanceKind.ROUND_ROBIN)),
        (fields.Balance, "least_load", Balance(BalanceKind.LEAST_LOAD)),
        (fields.Balance, "peak_ewma", Balance(BalanceKind.PEAK_EWMA)),
        (fields.Balance, "prefix", Balance(BalanceKind.PREFIX)),
        (fields.Balance, "hash:consumer", Balance(BalanceKind.HASH)),
        (fields.Balance, "hash:header:X-Session", HEADER_X),
        (fields.PathGlob, "/v1/*", "/v1/*"),
        (fields.PathGlob, "*", "*"),
        (fields.AllowEntry, "group:a:b c", ("group", "a:b c")),
        (fields.Jwks, "https://idp.example.com/keys?x=1", "https://idp.example.com/keys?x=1"),
        (fields.Jwks, "http://127.0.0.1:8000/keys", "http://127.0.0.1:8000/keys"),
        (fields.Jwks, "../keys/jwks.json", "../keys/jwks.json"),
    ],
)
def test_read(kind, text, value):
    assert TypeAdapter(kind).validate_python(text) == value


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (fields.Version, "2", "`2` is not a version this Weir reads: expected `1`"),
        (fields.Algorithm, "HS256", "with a shared secret, whoever can check a token can make one"),
        (fields.Algorithm, "hs512", "with a shared secret"),
        (fields.Algorithm, "none", "a token without a signature proves nothing"),
        (fields.Algorithm, "NONE", "a token without a signature proves nothing"),
        (fields.Algorithm, "ES256K", "Input should be"),
        (fields.Balance, "least_laod", "unknown value `least_laod`: did you mean `least_load`?"),
        (
            fields.Balance,
            "x",
            "expected `round_robin`, `least_load`, `peak_ewma`, `prefix`, `hash:consumer`, `hash:header:NAME`",
        ),
        (fields.Balance, "hash", "unknown value `hash`"),
        (fields.Balance, "hash:header:a b", "`a b` is not the name of a header"),
        (fields.PathGlob, "v1", "`v1` is not a path"),
        (fields.PathGlob, "/v1?a=b", "has no query"),
        (fields.PathGlob, "", "is not a path"),
        (fields.PathGlob, "/" * 1001, "must have 1 to 1000 characters"),
        (fields.AllowEntry, "model:" + "*" * 1000, "must have 1 to 1000 characters"),
        (fields.AllowEntry, "groups:x", "unknown kind `groups`: did you mean `group`?"),
        (fields.AllowEntry, "zzz:x", "unknown kind `zzz`: expected `group`, `consumer`, `scope`, `model`"),
        (fields.AllowEntry, "research", "expected `group:NAME`, `consumer:NAME`, `scope:NAME` or `model:GLOB`"),
        (fields.AllowEntry, "group:", "expected `group:NAME`"),
        (fields.Jwks, "ftp://h/keys", "`ftp://h/keys` is neither an http(s) URL nor the path of a file"),
        (fields.Jwks, "file:///keys", "is neither"),
        (fields.Jwks, "https://", "is neither"),
        (fields.Jwks, "https://user:secret@h/keys", "a URL must not carry a user or password"),
        (fields.Jwks, "https://h:99999/keys", "is neither"),
        (fields.Jwks, "https://[::1/keys", "is neither"),
        (fields.Jwks, "", "must have 1 to 1000 characters"),
    ],
)
def test_refused(kind, text, message):
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python(text)
    assert message in str(caught.value)
