import pytest

from gateway.call import Call
from gateway.peek import expected_tokens, peek
from policies import errors
from policies.quota import prompt_tokens
from tests.support.call import call_of


def with_body(body: bytes, path: str = "/v1/chat/completions", content_type: str = "application/json") -> Call:
    call = call_of(path, body=body)
    call.head.content_type = content_type.encode()
    return call


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        (b'{"model":"tiny"}', ("tiny", False)),
        (b'{"model":"tiny","stream":true}', ("tiny", True)),
        (b'{"model":"tiny","stream":null,"messages":[{"model":1}]}', ("tiny", False)),
        ('{"model":"größe"}'.encode(), ("größe", False)),
    ],
)
def test_the_body_tells_model_and_stream(body, asked) -> None:
    found = peek(with_body(body))
    assert (found.model, found.stream is True) == asked


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"{}", b'{"model":1}', b'{"model":null}', b'{"model":""}', b"\xff",
        b'{"model":"a","stream":"yes"}', b'{"model":"a","model":"b"}', b'{"model":"a","mod\\u0065l":"b"}',
        b'{"model":"a","stream":false,"strea\\u006d":true}', b'{"model":"a","stream":false,"\\u0073tream":true}',
        b'{"model":"a","x":"\xff"}', b'{"model":"a","\xc1\xadodel":"b"}', b'{"model":"a","x":NaN}', b"[" * 100_000,
        b'{"model":"a"' + b',"x":{"y":' * 50_000, b'{"model":"a"} trailing',
    ],
)  # fmt: skip
def test_a_body_that_names_no_single_model_is_a_bad_request(body) -> None:
    with pytest.raises(errors.BadRequest):
        peek(with_body(body))


@pytest.mark.parametrize(("key", "value"), [("model", '"b"'), ("stream", "false")])
@pytest.mark.parametrize("form", ["\\u{:04x}", "\\u{:04X}"])
def test_a_key_given_twice_is_found_whichever_of_its_letters_is_escaped(key, value, form) -> None:
    for at, letter in enumerate(key):
        escaped = key[:at] + form.format(ord(letter)) + key[at + 1 :]
        for pair in (f'"{key}":{value},"{escaped}":{value}', f'"{escaped}":{value},"{key}":{value}'):
            with pytest.raises(errors.BadRequest, match=f"`{key}` more than once"):
                peek(with_body(f'{{{pair},"{"model" if key == "stream" else "stream"}":null}}'.encode()))


def test_a_form_names_its_model_in_a_field() -> None:
    kind = "multipart/form-data; boundary=b"
    field = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n'
    file = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n\x00\x01\r\n--b--\r\n'
    assert peek(with_body(field + file, "/v1/audio/transcriptions", kind)).model == "whisper"
    with pytest.raises(errors.BadRequest):
        peek(with_body(field + field + file, "/v1/audio/transcriptions", kind))


@pytest.mark.parametrize(
    "disposition",
    [
        b"form-data; name=model",
        b'form-data;name="model"; filename="x"',
        b'form-data; filename="x"; name="model"',
        b'form-data; name = "model"',
        b"form-data; name*=utf-8''model",
    ],
)
def test_a_form_that_another_reader_could_find_a_model_in_is_refused(disposition) -> None:
    body = b"--b\r\nContent-Disposition: %b\r\n\r\nsecret\r\n--b--\r\n" % disposition
    with pytest.raises(errors.BadRequest):
        peek(with_body(body, "/v1/audio/transcriptions", "multipart/form-data; boundary=b"))


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=b", "text/plain"])
def test_a_path_that_takes_json_takes_nothing_else_for_it(kind) -> None:
    with pytest.raises(errors.BadRequest):
        peek(with_body(b"--b--", "/v1/chat/completions", kind))
    assert peek(with_body(b'{"model":"a"}', "/v1/chat/completions", kind)).model == "a"


def test_the_name_of_a_model_is_bounded() -> None:
    with pytest.raises(errors.BadRequest, match="at most 256"):
        peek(with_body(b'{"model":"%b"}' % (b"a" * 257)))


def test_a_body_with_two_stream_flags_is_a_bad_request() -> None:
    with pytest.raises(errors.BadRequest):
        peek(with_body(b'{"model":"a","stream":true,"stream":false}'))
    assert peek(with_body(b'{"model":"a","stream":true,"stream_options":{"include_usage":true}}')).stream


@pytest.mark.parametrize(
    ("more", "answer"),
    [
        (b'"max_tokens":50', 50),
        (b'"max_completion_tokens":60,"max_tokens":50', 60),
        (b'"max_tokens":50,"max_completion_tokens":null', 50),
        (b'"max_output_tokens":70', 70),
        (b'"max_tokens":50,"n":3', 150),
        (b'"max_tokens":50,"n":null', 50),
        (b'"max_tokens":50,"n":0', 50),
        (b'"max_tokens":0', 0),
        (b'"n":2', 2048),
        # what a backend will refuse says nothing
        (b'"max_tokens":-1', 1024),
        (b'"max_tokens":1.5', 1024),
        (b'"max_tokens":"50"', 1024),
        (b'"max_tokens":' + b"[" * 100 + b"]" * 100, 1024),
        (b'"max_tokens":' + b"9" * 10_000, 10**15 - 1),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
def test_how_long_an_answer_may_be(path, more, answer) -> None:
    call = with_body(b'{"model":"tiny",' + more + b"}", path)
    peek(call)
    assert expected_tokens(call, 40_000) == (prompt_tokens(call.body), answer)


def test_an_embedding_has_a_prompt_alone() -> None:
    assert expected_tokens(with_body(b'{"model":"e","input":"abcdef"}', "/v1/embeddings"), 40_000) == (8, 0)


@pytest.mark.parametrize(
    "path", ["/v2/models/m/infer", "/v1/images/generations", "/v1/audio/speech", "/v1/models", "/elsewhere"]
)
def test_of_other_paths_nobody_knows_the_tokens(path) -> None:
    assert expected_tokens(with_body(b'{"model":"tiny","max_tokens":50}', path), 40_000) == (0, 0)
