"""The message is ORCA's, byte for byte: field numbers and types as https://github.com/cncf/xds has them."""

import struct

from open_inference.orca_load_report_pb2 import OrcaLoadReport


def double(field, value):
    return bytes([field << 3 | 1]) + struct.pack("<d", value)


def entry(field, name, value):
    body = b"\x0a" + bytes([len(name)]) + name.encode() + double(2, value)
    return bytes([field << 3 | 2, len(body)]) + body


def test_it_is_written_and_read_as_others_do():
    message = OrcaLoadReport(
        cpu_utilization=0.5,
        mem_utilization=0.25,
        request_cost={"a": 1.0},
        utilization={"b": 0.125},
        rps_fractional=3.5,
        eps=0.5,
        named_metrics={"num_requests_running": 2.0},
        application_utilization=0.75,
    )
    written = (
        double(1, 0.5) + double(2, 0.25) + entry(4, "a", 1.0) + entry(5, "b", 0.125) + double(6, 3.5) + double(7, 0.5)
        + entry(8, "num_requests_running", 2.0) + double(9, 0.75)
    )  # fmt: skip
    assert message.SerializeToString(deterministic=True) == written
    assert OrcaLoadReport.FromString(b"\x18\x07" + written) == OrcaLoadReport.FromString(b"\x18\x07" + written)
    assert OrcaLoadReport.FromString(b"\x18\x07" + written).named_metrics == message.named_metrics  # with `rps`
