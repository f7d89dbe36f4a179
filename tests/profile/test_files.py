"""Files of results: new, private, inside their folder."""

import os
import stat
from contextlib import contextmanager

import pytest

from ms_profile import files
from support.mutation import Mutation, assert_caught


@contextmanager
def umask(value):
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("mask", "folder", "file"), [(0, 0o750, 0o640), (0o077, 0o700, 0o600)])
def test_modes_are_ours_and_never_wider_than_the_umask(mask, folder, file, tmp_path):
    with umask(mask):
        made = files.make_folder(tmp_path / "a" / "b")
        written = files.write_new(made, "x.json", "{}")
        source = made / "source"
        source.write_text("trace")
        adopted = files.adopt(source, made, "y.pt.trace.json")
        with files.workspace(made) as place:
            assert mode(place) == 0o700
    assert [mode(path) for path in (made.parent, made, written, adopted)] == [
        folder, folder, file, file,
    ]  # fmt: skip
    assert sorted(os.listdir(made)) == ["x.json", "y.pt.trace.json"]


def test_a_folder_that_exists_keeps_its_mode(tmp_path):
    tmp_path.chmod(0o711)
    assert mode(files.make_folder(tmp_path)) == 0o711


def check_nothing_is_overwritten(folder):
    for number in range(3):
        files.write_new(folder, "rank0.flops.json", str(number))
        (folder / "source").write_text(str(number))
        files.adopt(folder / "source", folder, "rank0_steps1-2.pt.trace.json")
    for number in range(3):
        middle = f".{number}" if number else ""
        assert (folder / f"rank0.flops{middle}.json").read_text() == str(number)
        assert (folder / f"rank0_steps1-2{middle}.pt.trace.json").read_text() == str(number)


def test_nothing_is_overwritten(tmp_path):
    check_nothing_is_overwritten(tmp_path)
    assert files.free_number(tmp_path, "rank0.flops.json", "new") == 3
    assert files.free_number(tmp_path, "new") == 0


RENAMES = Mutation("rename", "ms_profile.files:adopt", "os.link", "os.replace")


def test_a_rename_would_be_caught(tmp_path):
    count = iter("abc")

    def check():
        folder = tmp_path / next(count)
        folder.mkdir()
        check_nothing_is_overwritten(folder)

    assert_caught(RENAMES, check, by=(AssertionError, FileNotFoundError))


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", ".hidden", "", "a\n", "a b"])
def test_a_name_cannot_leave_the_folder(name, tmp_path):
    inside = files.make_folder(tmp_path / "inside")
    for write in (files.write_new, lambda f, n, c: files.free_number(f, n)):
        with pytest.raises(ValueError, match="a file name has letters"):
            write(inside, name, "content")
    assert os.listdir(tmp_path) == ["inside"]
    assert os.listdir(inside) == []


def test_a_link_in_the_way_is_not_followed(tmp_path):
    inside = files.make_folder(tmp_path / "inside")
    (inside / "x.json").symlink_to(tmp_path / "outside")
    assert files.write_new(inside, "x.json", "content").name == "x.1.json"
    assert not (tmp_path / "outside").exists()


def test_an_unwritable_path_is_a_stated_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made"):
        files.make_folder(tmp_path / "file" / "below")
    with pytest.raises(ValueError, match="is not a folder"):
        files.make_folder(tmp_path / "file")
    with pytest.raises(ValueError, match="nothing can be written to"):
        files.check_writable(tmp_path / "absent")
    files.check_writable(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


def test_where_links_do_not_work_the_file_is_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    check_nothing_is_overwritten(tmp_path)


def test_a_file_that_cannot_be_written_whole_is_removed(tmp_path, monkeypatch):
    class Full(OSError):
        pass

    class File:
        def __init__(self, handle, _):
            os.close(handle)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, _):
            raise Full

    monkeypatch.setattr(os, "fdopen", File)
    with pytest.raises(Full):
        files.write_new(tmp_path, "x.json", "content")
    assert os.listdir(tmp_path) == []
