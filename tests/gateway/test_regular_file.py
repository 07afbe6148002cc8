"""What is a file, and what only looks like one."""

import os

import pytest

from gateway import regular_file


def test_as_much_as_is_wanted(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert [regular_file.read(tmp_path / "link", size) for size in (0, 3, 100)] == [b"", b"con", b"content"]


def test_a_name_that_no_file_has(tmp_path):
    with pytest.raises(OSError, match="no file can have this name"):
        regular_file.read(tmp_path / "a\0b", 10)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (os.mkfifo, "not a regular file"),
    ],
)
def test_what_is_no_file_is_told_at_once(tmp_path, make, why):
    path = tmp_path / "file"
    make(path)
    with pytest.raises(OSError, match=why) as told:
        regular_file.read(path, 10)
    assert (told.value.strerror, told.value.filename) == (why, str(path))
