import contextlib
import os

import pytest

from gateway.last_good import LastGood, unnamed_file


@pytest.fixture
def descriptor():
    with unnamed_file() as descriptor:
        yield descriptor


@pytest.mark.parametrize("texts", [[b"a: 1\n"], [b""], [b"long: text\n", b"short\n"], [b"b" * 2**20, b"c"]])
def test_what_was_written_last_is_read_by_everybody(descriptor, texts):
    for text in texts:
        LastGood(descriptor).write(text)
    with contextlib.closing(os.fdopen(os.dup(descriptor))) as other:
        assert LastGood(other.fileno()).read() == texts[-1]


def test_at_first_there_is_nothing(descriptor):
    assert LastGood(descriptor).read() is None


@pytest.mark.parametrize("bytes_", [1, 31, 32, 40])
def test_half_a_text_is_none(descriptor, bytes_):
    LastGood(descriptor).write(b"version: 1\nroutes: []\n")
    os.truncate(descriptor, bytes_)
    assert LastGood(descriptor).read() is None


def test_it_has_no_name(descriptor):
    assert os.fstat(descriptor).st_nlink == 0
