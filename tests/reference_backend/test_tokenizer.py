"""Templates in, text out: chat templates as models bring them, and text that appears token by token."""

import json

import pytest

pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tokenizers import Tokenizer as FastTokenizer  # noqa: E402
from tokenizers import decoders, models  # noqa: E402

from reference_backend.engine.config import ModelError  # noqa: E402
from reference_backend.refusals import ApiError  # noqa: E402
from reference_backend.tokenizer import Message, TextStream, Tokenizer  # noqa: E402
from tests.support.tiny_model import DIRECTORY  # noqa: E402

TINY = Tokenizer(DIRECTORY)


def streamed(text, stops=()):
    """The text as a client gets it, token by token, and whether it was stopped."""
    stream = TextStream(TINY, stops)
    out = ""
    for token in TINY.encode(text):
        out += stream.feed(token)
        if stream.is_stopped:
            return out, True
    return out + stream.finish(), stream.is_stopped


def cut(text, stops):
    """What should come out: everything before the stop string that is complete first."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(ends)[1]] if ends else text


@settings(max_examples=50)
@given(st.text(max_size=60))
def test_any_text_comes_out_as_it_went_in(text):
    assert streamed(text) == (text, False)


@pytest.mark.parametrize("text", ["a" * 9000, "circuit breaker " * 800, " " * 9000, "😀" * 5000], ids=range(4))
def test_what_is_hopeless_is_too_long_indeed(text):
    tokens = len(TINY.encode(text))
    assert not TINY.is_hopeless(len(text), tokens)
    assert TINY.is_hopeless(len(text), tokens // 500)
    assert TINY.largest_token == 1023


@settings(max_examples=150)
@given(st.text("abc ä😀", max_size=30), st.lists(st.text("abc ä😀", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_wherever_tokens_end(text, stops):
    out, is_stopped = streamed(text, tuple(stops))
    assert is_stopped == any(stop in text for stop in stops)
    assert text.startswith(out)
    if len(stops) <= 1:
        assert out == cut(text, stops)
    assert not any(stop in out for stop in stops)


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        (["Hel", "lo wor", "ld"], ["Hel", "lo ", ""]),  # held: "wor" could become "world"
        (["Hel", "lo wor", "k"], ["Hel", "lo ", "work"]),
        (["wo", "r", "l", "d", "!"], ["", "", "", "", ""]),
    ],
)
def test_only_what_may_become_a_stop_string_is_held_back(tokens, pieces, monkeypatch):
    class Pieces:
        def decode(self, ids):
            return "".join(tokens[i] for i in ids)

    stream = TextStream(Pieces(), ("world",))
    assert [stream.feed(i) if not stream.is_stopped else "" for i in range(len(tokens))] == pieces


def test_a_character_in_several_tokens_comes_whole():
    ids = TINY.encode("😀")
    assert len(ids) > 1
    stream = TextStream(TINY)
    assert [stream.feed(token) for token in ids] == [""] * (len(ids) - 1) + ["😀"]


def test_bytes_that_never_become_a_character_do_not_hold_the_stream():
    broken = TINY.encode("😀")[0]
    stream = TextStream(TINY)
    out = "".join(stream.feed(broken) for _ in range(20))
    assert out
    assert set(out + stream.finish()) == {"\N{REPLACEMENT CHARACTER}"}


def test_spaces_survive_a_decoder_that_strips_the_first(tmp_path):
    """As in Llama 2: each word brings its space, and the decoder drops the one at the very beginning."""
    words = FastTokenizer(models.WordLevel({"\u2581Hello": 0, "\u2581big": 1, "\u2581world": 2}, "\u2581big"))
    words.decoder = decoders.Metaspace()
    words.save(str(model_directory(tmp_path) / "tokenizer.json"))
    stream = TextStream(Tokenizer(tmp_path))
    assert [stream.feed(token) for token in (0, 1, 2)] == ["Hello", " big", " world"]


def test_half_a_character_at_the_end_is_told_as_broken():
    stream = TextStream(TINY)
    assert stream.feed(TINY.encode("😀")[0]) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_a_chat_becomes_the_text_of_the_template():
    ids = TINY.encode_chat([Message("system", "Be brief."), Message("user", "Hi")])
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert ids == TINY.encode(expected)


def model_directory(tmp_path, template=None, **more):
    """The default model's tokenizer with other settings around it."""
    for name in ("tokenizer.json", "generation_config.json"):
        (tmp_path / name).write_bytes((DIRECTORY / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} | more))
    return tmp_path


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{% for m in messages %}{{ m['content'] }}|{% endfor %}", "<|im_start|>Hi|"),
        ([{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}], "yes"),
        ("{% if add_generation_prompt %}\nbot:{% endif %}", "bot:"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi"}]'),
    ],
)
def test_templates_as_models_bring_them(tmp_path, template, text):
    directory = model_directory(tmp_path, template, bos_token={"content": "<|im_start|>"})
    assert Tokenizer(directory).encode_chat([Message("user", "Hi")]) == TINY.encode(text)


def test_a_template_in_its_own_file_comes_first(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer(model_directory(tmp_path, "from settings")).encode_chat([]) == TINY.encode("from the file")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template; use /v1/completions"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].content.missing }}", "no element 9"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages + 1 }}", "can only concatenate"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion depth"),
    ],
)
def test_a_template_that_refuses_says_why(tmp_path, template, message):
    with pytest.raises(ApiError, match=message):
        Tokenizer(model_directory(tmp_path, template)).encode_chat([Message("user", "Hi")])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "tokenizer.json: cannot be used as a tokenizer"),
        ("tokenizer.json", None, "tokenizer.json: no such file"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json: a JSON object is expected"),
        ("tokenizer_config.json", b'{"chat_template": "{% for %}"}', "the chat template is broken"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}', "`template` - at `\\$.chat_template"),
        ("tokenizer_config.json", b'{"chat_template": [1]}', "tokenizer_config.json: Expected `object`"),
        ("tokenizer_config.json", b'{"chat_template": {"default": "x"}}', "tokenizer_config.json: Expected `str"),
        ("tokenizer_config.json", b'{"eos_token": {"a": 1}}', "`content` - at `\\$.eos_token"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: cannot be read"),
        ("generation_config.json", b"{", "generation_config.json: cannot be read"),
        ("generation_config.json", b'{"eos_token_id": [[]]}', "generation_config.json: Expected `int`"),
        ("generation_config.json", b'{"eos_token_id": "2"}', "generation_config.json: Expected `int"),
    ],
)
def test_a_broken_tokenizer_is_told_in_one_line(tmp_path, name, content, message):
    path = model_directory(tmp_path) / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("generation", "settings", "expected"),
    [
        ({"eos_token_id": [2, 0]}, {}, {2, 0}),
        ({"eos_token_id": 2}, {}, {2}),
        ({}, {"eos_token": "<|im_end|>"}, {2}),
        ({}, {"eos_token": "no such token"}, set()),
        ({}, {}, set()),
    ],
)
def test_the_end_tokens_are_found(tmp_path, generation, settings, expected):
    directory = model_directory(tmp_path, **settings)
    (directory / "generation_config.json").write_text(json.dumps(generation))
    assert Tokenizer(directory).end_tokens == expected
