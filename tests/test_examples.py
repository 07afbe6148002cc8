"""Everything under examples/ is valid: as Weir reads it, and as an editor with the JSON Schema does."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from gateway import config
from policies import document

EXAMPLES = Path(__file__).parent.parent / "examples"
POLICIES = sorted((EXAMPLES / "policies").glob("*.yaml"))


def test_there_are_five_policies():
    assert len(POLICIES) == 5


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_policy(path):
    assert document.parse(path.read_bytes(), base=path.parent).routes
    schema = json.loads(Path(document.__file__).with_name("schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_every_example_is_explained(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert sum("#" in line for line in lines) >= 4


def test_weir_yaml_shows_the_defaults():
    shown = config.load(EXAMPLES / "weir.yaml", {})
    bare = config.parse(b"{policy: p.yaml, discovery: {etcd: {endpoints: http://h:1}}}", {}, base=EXAMPLES)
    for name in ("listen", "admin", "tls", "workers", "limits"):
        assert getattr(shown, name) == getattr(bare, name), name
    assert shown.discovery.allow_networks == bare.discovery.allow_networks
    assert shown.policy.file in POLICIES
