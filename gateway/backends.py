"""`weir backends`: one look at what is registered in etcd, and how each backend answers its health check."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from discovery.discovery import Seen, backends_in, list_backends
from discovery.endpoint import Endpoint
from discovery.etcd import EtcdClient, EtcdSettings
from discovery.probe import Checked, HttpProbe, Probe
from discovery.source import SourceFailure
from gateway.certificates import Pem
from gateway.children import CannotRun
from gateway.config import PRIVATE_NETWORKS
from gateway.rpc.health import GrpcProbe

COLUMNS = ("service", "id", "url", "models", "weight", "state", "health")


async def look(etcd: str) -> list[Seen]:
    """Everything registered, as a gateway with the default `allow_networks` sees it. Raises CannotRun."""
    async with EtcdClient(EtcdSettings(endpoints=(etcd,))) as client, HttpProbe() as probe:
        try:
            return await list_backends(backends_in(client), probe=both(probe), allow_networks=PRIVATE_NETWORKS)
        except SourceFailure as failure:
            raise CannotRun(f"no answer from etcd: {failure}; start it, or name another with --etcd") from failure


def both(over_http: Probe) -> Probe:
    """A check over HTTP, and over gRPC where a backend speaks it."""
    over_grpc = GrpcProbe(Pem)

    async def check(endpoint: Endpoint) -> Checked:
        first = await over_http(endpoint)
        if endpoint.grpc_port is None:
            return first
        second = await over_grpc(endpoint)
        return Checked(first.is_passing and second.is_passing, f"{first.reason}, {second.reason}")

    return check


def table(seen: Sequence[Seen]) -> Table:
    """One row each. What is written in etcd is shown as text, never taken for markup."""
    shown = Table(*COLUMNS, box=None, header_style="bold")
    for one in seen:
        shown.add_row(*map(Text, row(one)))
    return shown


def row(seen: Seen) -> tuple[str, ...]:
    """The cells of one registration."""
    endpoint = seen.endpoint
    if endpoint is None:
        service, _, name = seen.key.partition("/")
        return (service, name, "", "", "", "ignored", seen.checked.reason)
    return (
        endpoint.service,
        endpoint.id,
        f"{endpoint.scheme}://{endpoint.authority}{endpoint.base_path}",
        ", ".join(f"{model.name}:{model.version}" if model.version else model.name for model in endpoint.models),
        str(endpoint.weight),
        "draining" if endpoint.draining else "serving",
        f"{'passing' if seen.checked.is_passing else 'failing'} ({seen.checked.reason})",
    )
