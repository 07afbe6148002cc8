"""What protoc made is what it makes, and stands beside the messages of another library that has the same names."""

import subprocess
import sys
from pathlib import Path

import pytest

import open_inference
from open_inference import SERVICE, inference_pb2

HERE = Path(open_inference.__file__).parent


@pytest.mark.parametrize("name", ["inference", "orca_load_report"])
def test_it_is_made_of_the_proto_that_lies_beside_it(tmp_path, name):
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{HERE}", f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    subprocess.run([*command, f"{name}.proto"], check=True)
    made = (tmp_path / f"{name}_pb2.py").read_text().replace("_pool.Default()", "_pool.DescriptorPool()")
    assert made == (HERE / f"{name}_pb2.py").read_text(), "run `make stubs`"
    assert (tmp_path / f"{name}_pb2.pyi").read_text() == (HERE / f"{name}_pb2.pyi").read_text(), "run `make stubs`"


def test_triton_clients_mean_the_same():
    """Each field of ours is one of theirs, with its name, number and type, and so is each call."""
    theirs = pytest.importorskip("tritonclient.grpc.service_pb2", reason="tritonclient is not installed").DESCRIPTOR.pool
    service = theirs.FindServiceByName(SERVICE).methods_by_name
    for method in inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        there = service[method.name]
        assert (method.input_type.full_name, method.output_type.full_name) == (
            there.input_type.full_name,
            there.output_type.full_name,
        )
    seen = list(inference_pb2.DESCRIPTOR.message_types_by_name.values())
    for message in seen:
        seen.extend(message.nested_types)
        for field in message.fields:
            there = theirs.FindMessageTypeByName(message.full_name).fields_by_name[field.name]
            assert (field.number, field.type, field.is_repeated) == (there.number, there.type, there.is_repeated)
    for value in inference_pb2.DataType.DESCRIPTOR.values:
        assert theirs.FindEnumTypeByName("inference.DataType").values_by_name[value.name].number == value.number
