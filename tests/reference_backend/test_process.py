"""The command line: what it takes, what it refuses, and with which exit code."""

import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend import process as command  # noqa: E402
from reference_backend.repository import Entry  # noqa: E402
from tests.support.tiny_model import DIRECTORY  # noqa: E402


def run(arguments):
    return command.main(arguments, clock=time.monotonic, wall=time.time)


def test_the_server_does_without_torch():
    """It is in the worker: the server starts faster, and is as small as a server."""
    program = "import reference_backend.process, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_tiny_is_known_by_name():
    options = command.parse(["--model", "tiny"])
    assert (options.model, options.service) == (DIRECTORY, None)
    assert command.only_entry(options) == Entry("tiny", "", DIRECTORY)
    assert (options.host, options.port, options.version, options.etcd) == ("127.0.0.1", 0, "", None)


def test_a_path_is_a_model_named_after_its_directory(tmp_path, monkeypatch):
    (tmp_path / "Llama-3").mkdir()
    monkeypatch.chdir(tmp_path / "Llama-3")
    options = command.parse(["--model", ".", "--service", "chat", "--version", "2"])
    assert (str(command.only_entry(options)), options.service) == ("Llama-3@2", "chat")


def test_weights_can_be_narrowed_shared_and_made_up():
    plain = command.parse(["--model", "tiny"]).sizes
    assert (plain.quantize, plain.ranks, plain.load_format) == (None, 1, "safetensors")
    options = ["--quantize", "fp8", "--tensor-parallel", "2", "--load-format", "dummy"]
    asked = command.parse(["--model", "tiny", *options]).sizes
    assert (asked.quantize, asked.ranks, asked.load_format) == ("fp8", 2, "dummy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model"),
        (["--model", "tiny", "--port", "70000"], "'70000' is not a whole number, 0 to 65535"),
        (["--model", "tiny", "--port", "http"], "'http' is not a whole number"),
        (["--model", "tiny", "--max-running", "0"], "'0' is not a whole number, 1 or more"),
        (["--model", "tiny", "--etcd", "localhost:2379"], "is not a URL like http://127.0.0.1:2379"),
        (["--model", "tiny", "--etcd", "http://[::1"], "is not a URL"),
        (["--model", "tiny", "--etcd", "http://e:2379", "--host", "0.0.0.0"], "--announce-url"),
        (["--model", "tiny", "--quantize", "int4"], "invalid choice: 'int4'"),
        (["--model", "tiny", "--tensor-parallel", "0"], "1 or more"),
        (["--model", "tiny", "--load-format", "gguf"], "invalid choice: 'gguf'"),
        (["--model", "tiny", "--wizard"], "unrecognized arguments: --wizard"),
        (["--model", "tiny", "--repository", "models"], "not allowed with argument"),
        (["--model", "tiny", "--serve", "tiny"], "--serve names models of a --repository"),
        (["--repository", "models", "--version", "2"], "choose with --serve NAME@VERSION"),
        (["--repository", "models", "--serve", "tiny@newest"], "'newest' is none of: all, latest"),
    ],
)
def test_wrong_use_is_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        command.parse(arguments)
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("reference_backend: ")
    assert message in line


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as end:
        command.parse(["--help"])
    assert end.value.code == 0
    assert "python -m reference_backend --model tiny --port 9000" in capsys.readouterr().out


def test_a_model_that_is_not_there_is_exit_code_3(tmp_path, capsys):
    assert run(["--model", str(tmp_path / "gone")]) == 3
    error = capsys.readouterr().err
    assert "gone; --model takes a Hugging Face directory, or one of: minilm, tiny, tiny-embedding" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("which", "expected"), [("", "3"), ("1", "1"), ("2", "it has 1, 3")], ids=["latest", "named", "absent"]
)
def test_a_directory_of_versions_is_one_of_them(tmp_path, which, expected):
    for version in ("1", "3"):
        (tmp_path / "chat" / version).mkdir(parents=True)
    options = command.parse(["--model", str(tmp_path / "chat"), "--version", which])
    if which == "2":
        with pytest.raises(command.CannotStartError, match=expected):
            command.only_entry(options)
    else:
        assert command.only_entry(options) == Entry("chat", expected, tmp_path / "chat" / expected)


@pytest.fixture
def store(tmp_path):
    for place in ("chat/1", "chat/2", "embed/7"):
        (tmp_path / place).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("serve", "expected"),
    [
        ([], {"chat": ["2"], "embed": ["7"]}),
        (["chat@all"], {"chat": ["1", "2"]}),
        (["embed", "chat@1"], {"embed": ["7"], "chat": ["1"]}),
        (["chat@3"], "no model chat in a version that --serve asks for"),
        (["gone"], "no model gone"),
    ],
)
def test_a_repository_serves_what_is_asked_for(store, serve, expected):
    options = command.parse(["--repository", str(store), *(word for each in serve for word in ("--serve", each))])
    if isinstance(expected, str):
        with pytest.raises(command.CannotStartError, match=expected):
            command.names(options)
        return
    found = {name: [entry.version for entry in command.entries(options, name)] for name in command.names(options)}
    assert found == expected


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "config.json",
            lambda text: text.replace('"vocab_size": 1024', '"vocab_size": 1000'),
            "do not belong together",
        ),
        ("config.json", lambda text: text.replace("LlamaForCausalLM", "MambaForCausalLM"), "MambaForCausalLM"),
        ("config.json", lambda _text: "{", "cannot be read"),
        ("tokenizer.json", lambda text: text[:-100], "cannot be used as a tokenizer"),
        ("model.safetensors", None, "neither model.safetensors nor"),
    ],
)
def test_a_directory_that_is_no_good_is_exit_code_3(tmp_path, name, change, message, capsys):
    for path in DIRECTORY.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if change is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(change((tmp_path / name).read_text()))
    assert run(["--model", str(tmp_path)]) == 3
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_model_that_does_not_fit_is_exit_code_3(capsys):
    assert run(["--model", "tiny", "--max-running", str(10**12)]) == 3
    error = capsys.readouterr().err
    assert "the model does not fit: " in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("option", ["--port", "--grpc-port"])
def test_a_port_in_use_is_exit_code_3(option, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["--model", "tiny", option, str(port)]) == 3
    error = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}" in error
    assert f"choose another {option}" in error
    assert error.count("\n") == 1


def test_a_name_that_cannot_be_registered_is_exit_code_2(capsys):
    arguments = ["--model", "tiny", "--service", "no/such", "--etcd", "http://127.0.0.1:1"]
    assert run(arguments) == 2
    assert "cannot be registered: " in capsys.readouterr().err
