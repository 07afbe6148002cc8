"""The command line: what it takes, what it refuses, and with which exit code."""

import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend import process as command  # noqa: E402
from tests.support.tiny_model import DIRECTORY  # noqa: E402


def run(arguments):
    return command.main(arguments, clock=time.monotonic, wall=time.time)


def test_the_server_does_without_torch():
    """It is in the worker: the server starts faster, and is as small as a server."""
    program = "import reference_backend.process, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_tiny_is_known_by_name():
    options = command.parse(["--model", "tiny"])
    assert (options.model, options.name, options.service) == (DIRECTORY, "tiny", "tiny")
    assert (options.host, options.port, options.version, options.etcd) == ("127.0.0.1", 0, "", None)


def test_a_path_is_a_model_named_after_its_directory(tmp_path, monkeypatch):
    (tmp_path / "Llama-3").mkdir()
    monkeypatch.chdir(tmp_path / "Llama-3")
    options = command.parse(["--model", ".", "--service", "chat", "--version", "2"])
    assert (options.name, options.service, options.version) == ("Llama-3", "chat", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model"),
        (["--model", "tiny", "--port", "70000"], "70000 is not a port"),
        (["--model", "tiny", "--port", "http"], "'http' is not a whole number"),
        (["--model", "tiny", "--max-running", "0"], "at least 1"),
        (["--model", "tiny", "--etcd", "localhost:2379"], "is not a URL like http://127.0.0.1:2379"),
        (["--model", "tiny", "--etcd", "http://[::1"], "is not a URL"),
        (["--model", "tiny", "--etcd", "http://e:2379", "--host", "0.0.0.0"], "--announce-url"),
        (["--model", "tiny", "--wizard"], "unrecognized arguments: --wizard"),
    ],
)
def test_wrong_use_is_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        command.parse(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as end:
        command.parse(["--help"])
    assert end.value.code == 0
    assert "python -m reference_backend --model tiny --port 9000" in capsys.readouterr().out


def test_a_model_that_is_not_there_is_exit_code_3(tmp_path, capsys):
    assert run(["--model", str(tmp_path / "gone")]) == 3
    error = capsys.readouterr().err
    assert "gone; --model takes a Hugging Face directory, or one of: tiny" in error
    assert error.count("\n") == 1


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


def test_a_port_in_use_is_exit_code_3(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["--model", "tiny", "--port", str(port)]) == 3
    error = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}" in error
    assert "choose another --port" in error
    assert error.count("\n") == 1


def test_a_name_that_cannot_be_registered_is_exit_code_2(capsys):
    arguments = ["--model", "tiny", "--service", "no/such", "--etcd", "http://127.0.0.1:1"]
    assert run(arguments) == 2
    assert "cannot be registered: " in capsys.readouterr().err
