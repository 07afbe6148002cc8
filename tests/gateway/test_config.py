from ipaddress import ip_network
from pathlib import Path

import pytest

from gateway import config
from gateway.config import Admin, Config, Discovery, Etcd, Limits, PolicyPlace, Redis, StaticBackend, Telemetry, Tls
from gateway.config_fields import Address
from policies.problems import InvalidDocument

TOKEN = "0123456789abcdef"
LEAST = "policy: policy.yaml\ndiscovery: {static: []}\n"
EVERYTHING = """\
listen: 0.0.0.0:80
admin: {listen: 0.0.0.0:81, auth: {token_file: admin.token}}
tls: {cert: file.pem, key: file.pem}
workers: 4
policy: {etcd: default}
discovery:
  etcd:
    endpoints: ["http://a:2379", "${ETCD}"]
    prefix: /other
    username: weir
    password_file: file.pem
    ca: file.pem
    cert: file.pem
    key: file.pem
  allow_networks: [10.0.0.0/8]
redis: {url: "redis://:${REDIS_PASSWORD}@h/1"}
telemetry: {otlp: "http://h:4318", sample: 100%, slow: 500ms, log: console}
limits: {body: 1MiB, header: 8KiB, head_timeout: 1s, body_timeout: 2s, idle: 3s, connections: 1k}
"""


@pytest.fixture
def base(tmp_path):
    (tmp_path / "admin.token").write_text(TOKEN)
    (tmp_path / "file.pem").write_text("-")
    return tmp_path


def parse(text: str, base: Path = Path("/etc/weir"), **environ: str) -> Config:
    return config.parse(text.encode(), environ, base=base)


def refusals(text: str, base: Path = Path("/etc/weir"), **environ: str) -> list[str]:
    with pytest.raises(InvalidDocument) as caught:
        parse(text, base, **environ)
    return [line.removeprefix("f:") for line in caught.value.lines("f")]


def test_everything_at_once(base):
    file = base / "file.pem"
    read = parse(EVERYTHING, base, ETCD="https://b:2379", REDIS_PASSWORD="hush")
    assert read == Config(
        listen=Address("0.0.0.0", 80),
        admin=Admin(Address("0.0.0.0", 81), config.AdminAuth(TOKEN)),
        tls=Tls(file, file),
        workers=4,
        policy=PolicyPlace(etcd="default"),
        discovery=Discovery(
            etcd=Etcd(("http://a:2379", "https://b:2379"), "/other", "weir", file, file, file, file),
            allow_networks=(ip_network("10.0.0.0/8"),),
        ),
        redis=Redis("redis://:hush@h/1"),
        telemetry=Telemetry("http://h:4318", 1.0, 0.5, "console"),
        limits=Limits(1 << 20, 8 << 10, 1.0, 2.0, 3.0, 1000),
    )


def test_what_is_left_out_has_its_documented_default():
    read = parse(LEAST)
    assert (str(read.listen), str(read.admin.listen), read.admin.auth) == ("127.0.0.1:8080", "127.0.0.1:8081", None)
    assert (read.workers, read.tls, read.redis) == (1, None, None)
    assert read.policy == PolicyPlace(file=Path("/etc/weir/policy.yaml"))
    assert read.telemetry == Telemetry(otlp=None, sample=0.01, slow=2.0, log="json")
    assert read.limits == Limits(32 << 20, 32 << 10, 10.0, 60.0, 75.0, 20_000)
    assert list(map(str, read.discovery.allow_networks)) == [
        "127.0.0.0/8", "::1/128", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"
    ]  # fmt: skip


def test_static_backends():
    text = "policy: p\ndiscovery: {static: [{service: a, url: 'http://h:1', models: [m, no], version: 2, weight: 3, grpc_port: 9}]}"
    assert parse(text).discovery.static == (StaticBackend("a", "http://h:1", ("m", "no"), "2", 3, 9),)


def test_the_contract_s_own_example_is_read(base):
    text = """\
listen: 127.0.0.1:8080
admin: {listen: 127.0.0.1:8081, auth: {token_file: admin.token}}
tls: {cert: file.pem, key: file.pem}
workers: 1
policy: policy.yaml
discovery:
  etcd: {endpoints: [http://127.0.0.1:2379], prefix: /weir/v1, username: "", password_file: "", ca: "", cert: "", key: ""}
  allow_networks: [127.0.0.0/8, 10.0.0.0/8]
redis: {url: redis://127.0.0.1:6379/0}
telemetry: {otlp: http://127.0.0.1:4318, sample: 0.01, slow: 2s, log: json}
limits: {body: 32MiB, header: 32KiB, head_timeout: 10s, body_timeout: 60s, idle: 75s, connections: 20000}
"""
    assert parse(text, base).discovery.etcd == Etcd(("http://127.0.0.1:2379",))


def test_secrets_are_in_no_repr(base):
    shown = repr(parse(EVERYTHING, base, ETCD="http://b", REDIS_PASSWORD="hush"))
    assert TOKEN not in shown
    assert "hush" not in shown


def test_load_is_relative_to_the_file(base):
    path = base / "weir.yaml"
    path.write_text(LEAST)
    assert config.load(path, {}).policy.file == base / "policy.yaml"
    with pytest.raises(OSError, match="No such file"):
        config.load(base / "not-there.yaml", {})


def test_a_variable_is_text_and_adds_no_keys():
    read = parse("policy: ${WHERE}/${FILE}\ndiscovery: {static: []}", WHERE="a", FILE="b: 1, c: [x]\nworkers: 9")
    assert read.policy.file == Path("/etc/weir/a/b: 1, c: [x]\nworkers: 9")
    assert read.workers == 1


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (LEAST + "listen: ${HOST}:${PORT}\n", ["3:9 listen: `0.0.0.0:` is not an address: expected HOST:PORT, such as `127.0.0.1:8080` or `[::1]:8080`"]),
        (LEAST + "listen: ${NOT_THERE}\n", ["3:9 listen: the environment variable `NOT_THERE` is not set"]),
        ("policy: ${A}${B}\ndiscovery: {etcd: {endpoints: ['${C}']}}",
         ["1:9 policy: the environment variable `A` is not set", "1:9 policy: the environment variable `B` is not set",
          "2:32 discovery.etcd.endpoints[0]: the environment variable `C` is not set"]),
        ("discovery: {etcd: {endpoints: [${C}]}}",
         ["1:33 not YAML: did not find expected ',' or ']' while parsing a flow sequence that begins on line 1; inside [] or {} a variable needs quotes: \"${NAME}\""]),
        (LEAST + "worker: 2\n", ["3:1 worker: unknown key `worker`: did you mean `workers`?"]),
        (LEAST + "workers: 0\n", ["3:10 workers: must be at least 1"]),
        (LEAST + "grpc: {listen: 127.0.0.1:8080}\n", ["1:1 `listen` and `grpc.listen` are both 127.0.0.1:8080"]),
        (LEAST + "grpc: {port: 1}\n", ["3:8 grpc.port: unknown key `port`: expected `listen`"]),
        ("policy: p\ndiscovery: {static: [{service: a, url: 'http://h', grpc_port: 0}]}",
         ["2:63 discovery.static[0].grpc_port: `0` is not a port: expected a number from 1 to 65535"]),
        (LEAST + "admin: {listen: 0.0.0.0:8081}\n", ["3:8 admin: 0.0.0.0:8081 can be reached from outside: set `auth`, or listen on 127.0.0.1"]),
        (LEAST + "admin: {auth: {token_file: admin.token}}\n", ["3:28 admin.auth.token_file: cannot read /etc/weir/admin.token: No such file or directory"]),
        (LEAST + "listen: 127.0.0.1:8081\n", ["1:1 `listen` and `admin.listen` are both 127.0.0.1:8081"]),
        (LEAST + "tls: {cert: x.pem}\n", ["3:6 tls.key: is missing", "3:13 tls.cert: cannot read /etc/weir/x.pem: No such file or directory"]),
        (LEAST + "tls: {ca: z}\n", ["3:6 tls.cert: is missing", "3:6 tls.key: is missing", "3:7 tls.ca: unknown key `ca`: expected `cert`, `key`, `client_ca`"]),
        ("policy: p\ndiscovery: {static: [], tls: {cert: x}}", ["2:37 discovery.tls.cert: cannot read /etc/weir/x: No such file or directory"]),
        (LEAST + "telemetry: {log: jsno, sample: 1}\n", ["3:18 telemetry.log: unknown value `jsno`: did you mean `json`?",
                                                        "3:32 telemetry.sample: `1` is not a share: write `1%` or `100%` if that is meant"]),
        (LEAST + "limits: {body: 32Mib}\n", ["3:16 limits.body: `32Mib` is not a size: expected one such as `32KiB`, `1MB` or a number of bytes"]),
        ("x: 1", ["1:1 discovery: is missing", "1:1 policy: is missing", "1:1 x: unknown key `x`: expected `policy`, `discovery`, `listen`, `admin`, `grpc`, `tls`, `workers`, `redis`, `telemetry`, `limits`"]),
        ("policy: {}\ndiscovery: {}", ["1:9 policy: expected a file, or `{etcd: NAME}`", "2:12 discovery: expected exactly one of `etcd` and `static`"]),
        ("policy: {etcd: a}\ndiscovery: {static: []}", ["1:1 `policy: {etcd: ...}` needs `discovery.etcd`, which says where etcd is"]),
        ("policy: p\ndiscovery: {etcd: {endpoints: http://h}, static: []}", ["2:12 discovery: expected exactly one of `etcd` and `static`"]),
        ("policy: p\ndiscovery: {etcd: {endpoints: http://h, username: u}}", ["2:19 discovery.etcd: `username` and `password_file` go together"]),
        ("policy: p\ndiscovery: {etcd: {endpoints: []}}", ["2:31 discovery.etcd.endpoints: must not be empty"]),
        ("workers: 1\nworkers: 2\n" + LEAST, ["2:1 workers: was already given on line 1"]),
        ("", ["1:1 the document is empty"]),
    ],
)  # fmt: skip
def test_what_is_refused(text, problems):
    assert refusals(text, HOST="0.0.0.0", PORT="") == problems


def test_certificate_and_key_of_etcd_go_together(base):
    text = "policy: p\ndiscovery: {etcd: {endpoints: http://h, cert: file.pem}}"
    assert refusals(text, base) == ["2:19 discovery.etcd: `cert` and `key` go together"]


def test_port_0_may_be_said_twice():
    assert parse(LEAST + "listen: 127.0.0.1:0\nadmin: {listen: 127.0.0.1:0}\n").listen.port == 0


def test_grpc_is_off_unless_it_is_said():
    assert parse(LEAST).grpc is None
    assert parse(LEAST + "grpc: {}\n").grpc.listen.port == 8082
