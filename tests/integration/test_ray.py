"""Reference backends as a Ray Serve deployment: registered in our etcd, served through the gateway, scaled on their load.

Ray lives in an environment of its own, as it is large: `sh benchmarks/install_peers.sh ray`.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.etcd_server import EtcdServer
from tests.support.raw_client import RawClient, chat_request
from tests.support.running_gateway import etcd_gateway, policy_with, until

ROOT = Path(__file__).parent.parent.parent
RAY = ROOT / "benchmarks" / "peers" / "ray"

pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not (RAY / ".installed").exists(), reason="Ray is not installed (sh benchmarks/install_peers.sh ray)"
    ),
    pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv (util-linux) is not installed"),
]

# A Ray of one machine, and the application on it with decisions as quick as they can be.
DRIVER = """
import signal, sys
import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, HTTPOptions
from deploy.ray.weir_ray import Backend, ByLoad

ray.init(num_cpus=4, include_dashboard=False, object_store_memory=80 << 20, _temp_dir=sys.argv[1], log_to_driver=False)
serve.start(proxy_location="Disabled")
scaling = AutoscalingConfig(
    min_replicas=1, max_replicas=2, look_back_period_s=1, metrics_interval_s=0.5, upscale_delay_s=0.2, downscale_delay_s=1,
    policy=AutoscalingPolicy(policy_function=ByLoad, policy_kwargs={"share": 0.7}),
)
arguments = ["--model", "tiny", "--etcd", sys.argv[2], "--max-running", "4", "--host", "127.0.0.1"]
serve.run(Backend.options(autoscaling_config=scaling).bind(arguments, sys.argv[3]), name="weir", route_prefix=None)
print("up", flush=True)
signal.sigwait({signal.SIGTERM})
serve.shutdown()
ray.shutdown()
"""
PATIENT = policy_with(timeout="{first_byte: 2m, total: 10m}")
QUICK = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # of loopback alone, and else it writes a token into the home of whoever tests
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.2",
}


@contextlib.asynccontextmanager
async def ray_serve(etcd: str):
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as home:  # noqa: S108  its sockets need short paths
        process = await asyncio.create_subprocess_exec(
            str(RAY / "bin" / "python"), "-c", DRIVER, home, etcd, sys.executable,
            cwd=ROOT, env=os.environ | QUICK | {"PYTHONPATH": str(ROOT)},
            stdout=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            async with asyncio.timeout(150):
                assert (await process.stdout.readline()) == b"up\n"
            yield
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(100):
                await process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def test_backends_under_ray_are_found_served_and_scaled_on_their_load(tmp_path):
    with EtcdServer(tmp_path) as etcd:
        async with ray_serve(etcd.url), etcd_gateway(tmp_path, etcd.url, policy=PATIENT) as gateway:

            def serving() -> int:
                backends = gateway.fleet.backends.values()
                return sum(bool(backend.healthy) and not backend.endpoint.draining for backend in backends)

            await until(lambda: serving() == 1, 60)
            async with RawClient(gateway.data_address) as client:
                answer = await client.ask(
                    {"model": "tiny", "prompt": "A canary is", "max_tokens": 5}, path="/v1/completions"
                )
            assert answer.status == 200, answer.body

            body = {"model": "tiny", "prompt": "A", "max_tokens": 300, "ignore_eos": True}
            async with contextlib.AsyncExitStack() as stack:
                clients = [await stack.enter_async_context(RawClient(gateway.data_address)) for _ in range(4)]
                asking = asyncio.gather(*(keep_asking(client, body) for client in clients))
                try:
                    await until(lambda: serving() == 2, 120)  # 4 of 4 places taken: one more replica
                finally:
                    asking.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await asking
            await until(lambda: serving() == 1, 120)  # nothing to do: one less
        running = [read(one) for one in Path("/proc").glob("[0-9]*/cmdline")]
        assert not [one for one in running if b"reference_backend" in one and etcd.url.encode() in one]


async def keep_asking(client: RawClient, body: dict) -> None:
    while True:
        client.send(chat_request(body, path="/v1/completions"))
        assert (await client.answer()).status == 200


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
