import http.server
import shutil
import threading

import pytest

from benchmarks import wrk
from benchmarks.processes import Failed

OUTPUT = """Running 3s test @ http://127.0.0.1:1/v1/chat/completions
  1 threads and 64 connections
Requests/sec:  11000.00

JSON {"requests": 33000, "micros": 3000000, "refused": 30, "broken": 2, "p50": 5500.0, "p99": 9120.5}
"""


def test_what_the_script_writes_is_read_in_our_units():
    load = wrk.parse(OUTPUT)
    assert load == wrk.Load(requests=33000, seconds=3.0, refused=30, broken=2, p50_ms=5.5, p99_ms=9.1205)
    assert load.per_second == 11000
    assert load.failed == 32


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("unable to connect to 127.0.0.1:1 Connection refused\n", "unable to connect"),
        ("", "no output"),
        ("\n\n", "no output"),
    ],
)
def test_no_such_line_is_told_with_what_was_said_instead(output, words):
    with pytest.raises(Failed, match=words):
        wrk.parse(output)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Bearer a.b", '"Bearer a.b"'), ('{"a": 1}', '"{\\"a\\": 1}"'), ("a\\b", '"a\\\\b"'), ("a\nb", '"a\\nb"')],
)
def test_a_header_becomes_a_string_of_lua(text, expected):
    assert wrk.lua(text) == expected


@pytest.mark.parametrize(("pause_ms", "line"), [(None, ""), (20, "delay = function() return 20 end")])
def test_a_pause_before_each_request_is_a_function_of_the_script(tmp_path, monkeypatch, pause_ms, line):
    monkeypatch.setattr(wrk.shutil, "which", lambda _: "true")
    target = wrk.Target(1, "/", {"Host": "x"}, b"{}")
    with pytest.raises(Failed, match="no output"):  # it is no real wrk
        wrk.run(target, connections=1, seconds=1, folder=tmp_path, pause_ms=pause_ms)
    assert line in (tmp_path / "request.lua").read_text().splitlines()


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed (apt-get install wrk)")
def test_several_bodies_are_sent_in_turn(tmp_path):
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            seen.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        target = wrk.Target(server.server_port, "/", {}, b'"one"', (b'"two"', b'"three"'))
        assert not wrk.run(target, connections=1, seconds=1, folder=tmp_path).failed
        server.shutdown()
    assert set(seen[:3]) == {b'"one"', b'"two"', b'"three"'}
    assert seen[3:6] == seen[:3]
