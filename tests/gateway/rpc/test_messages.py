import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.rpc.messages import MOST_FIELDS, encoded, names_in
from open_inference import inference_pb2 as pb
from policies import errors

TENSOR = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, -1])
LARGE = pb.ModelInferRequest(
    model_name="tiny", model_version="2", id="7", inputs=[TENSOR] * 3, raw_input_contents=[b"\x0a\x00" * 500_000]
).SerializeToString()


@pytest.mark.parametrize(
    ("message", "names"),
    [
        (b"", ("", "")),
        (pb.ModelReadyRequest(name="tiny").SerializeToString(), ("tiny", "")),
        (pb.ModelMetadataRequest(name="org/größe", version="1").SerializeToString(), ("org/größe", "1")),
        (LARGE, ("tiny", "2")),
        (b"\x0d1234\x11" + b"8" * 8 + b"\x78\x96\x01\x0a\x01m", ("m", "")),  # other kinds of fields, and unknown ones
    ],
)
def test_the_names_in_a_message(message, names) -> None:
    assert names_in(message, 1, 2) == names


def test_a_method_may_have_its_names_elsewhere() -> None:
    message = pb.RepositoryModelLoadRequest(repository_name="all", model_name="tiny").SerializeToString()
    assert names_in(message, 2, 0) == ("tiny", "")


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (b"\x0a", "not one of this method"),
        (b"\x0a\x05tin", "not one of this method"),  # shorter than it says
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "not one of this method"),
        (b"\xff" * 20, "not one of this method"),
        (b"\x0d123", "not one of this method"),
        (b"\x0b\x0c", "not one of this method"),  # a group
        (b"\x0f", "not one of this method"),  # a kind that there is not
        (b"\x02\x00", "not one of this method"),  # field 0
        (b"\x8a\x80\x80\x80\x80\x01\x00", "not one of this method"),  # field 1 to who reads 32 bits
        (b"\x0a\x02\xff\xfe", "not one of this method"),  # no UTF-8
        (b"\x0a\x01a\x0a\x01b", "names its model more than once"),
        (b"\x12\x01a\x12\x01a", "names its model more than once"),
        (b"\x0a\x81\x02" + b"a" * 257, "at most 256 characters"),
        (b"\x18\x01" * MOST_FIELDS, "more than 4096 fields"),
    ],
)
def test_what_is_refused(message, told) -> None:
    with pytest.raises(errors.BadRequest, match=told):
        names_in(message, 1, 2)


@given(st.binary(max_size=64))
def test_any_bytes_are_read_as_protobuf_reads_them_or_refused(message) -> None:
    try:
        names = names_in(message, 1, 2)
    except errors.BadRequest:
        return
    read = pb.ModelReadyRequest.FromString(message)
    assert (read.name, read.version) == names


@given(
    st.builds(pb.ModelInferRequest, model_name=st.text(max_size=20), model_version=st.text(max_size=5), id=st.text())
)
def test_every_message_of_protobuf_is_read(message) -> None:
    assert names_in(message.SerializeToString(), 1, 2) == (message.model_name, message.model_version)


@pytest.mark.parametrize(
    ("name", "document", "message"),
    [
        ("ServerLiveResponse", {"live": True}, pb.ServerLiveResponse(live=True)),
        ("ServerReadyResponse", {"ready": False}, pb.ServerReadyResponse()),
        (
            "ServerMetadataResponse",
            {"name": "weir", "version": "1", "extensions": []},
            pb.ServerMetadataResponse(name="weir", version="1"),
        ),
    ],
)
def test_answers_of_our_own(name, document, message) -> None:
    assert encoded(name, document) == message.SerializeToString()
