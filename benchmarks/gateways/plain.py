"""The floor: the backend itself, and two plain proxies without any policy."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gateways.gateway import Launch, Site, bearer, program
from benchmarks.processes import HOST

NGINX = """\
daemon off; master_process off; worker_processes 1; pid nginx.pid; error_log stderr error;
events {{ worker_connections 16384; }}
http {{
    access_log off; keepalive_requests 100000000; client_max_body_size 64m;
    client_body_temp_path temp; proxy_temp_path temp_proxy;
    upstream backends {{ {servers} keepalive 4096; keepalive_requests 100000000; }}
    server {{
        listen {host}:{port} backlog=4096;
        location / {{
            proxy_pass http://backends; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
        }}
    }}
}}
"""

HAPROXY = """\
global
    nbthread 1
    maxconn 9000
defaults
    mode http
    option http-no-delay
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend data
    bind {host}:{port}
    default_backend backends
backend backends
    balance roundrobin
    http-reuse always
{servers}
"""


@dataclass(frozen=True, slots=True)
class Direct:
    """No gateway: what the client and the backend cost by themselves. Its CPU is the backend's."""

    name: str = "direct"
    features: str = "no gateway; CPU is the mock backend's"

    def absent(self) -> str | None:
        return None

    def launch(self, _: Site) -> Launch | None:
        return None

    def headers(self, site: Site, consumer: str) -> dict[str, str]:
        return bearer(site, consumer)


@dataclass(frozen=True, slots=True)
class Nginx:
    name: str = "nginx"
    features: str = "plain proxy, round robin"

    def absent(self) -> str | None:
        return None if program("nginx") else "not installed (apt-get install nginx-light)"

    def launch(self, site: Site) -> Launch | None:
        servers = " ".join(f"server {url.removeprefix('http://')};" for url in site.backends)
        config = site.folder / "nginx.conf"
        config.write_text(NGINX.format(servers=servers, host=HOST, port=site.port))
        return Launch((program("nginx") or "nginx", "-p", str(site.folder), "-c", str(config)))

    def headers(self, site: Site, consumer: str) -> dict[str, str]:
        return bearer(site, consumer)


@dataclass(frozen=True, slots=True)
class HAProxy:
    name: str = "haproxy"
    features: str = "plain proxy, round robin"

    def absent(self) -> str | None:
        return None if program("haproxy") else "not installed (apt-get install haproxy)"

    def launch(self, site: Site) -> Launch | None:
        servers = "\n".join(
            f"    server s{number} {url.removeprefix('http://')}" for number, url in enumerate(site.backends)
        )
        config = site.folder / "haproxy.cfg"
        config.write_text(HAPROXY.format(servers=servers, host=HOST, port=site.port))
        return Launch((program("haproxy") or "haproxy", "-db", "-f", str(config)))

    def headers(self, site: Site, consumer: str) -> dict[str, str]:
        return bearer(site, consumer)
