"""Scratch folders of processes that were killed are removed; those of living ones, other hosts and users are not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage import held_folders
from storage.held_folders import HeldFolder, remove_dead, remove_scratch, scratch_folder

ROOT = Path(__file__).parents[2]
PREFIX = "musevl-scratch-"
OWNER = """
import sys, time
from storage.held_folders import scratch_folder
with scratch_folder("musevl-scratch-") as folder:
    (folder / "checkpoint.pt").write_bytes(b"large")
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all scratch folders, not yet looked at by this process."""
    monkeypatch.setenv("MUSEVL_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr(held_folders, "_swept", set())
    return tmp_path / "scratch"


def abandoned(parent: Path, prefix: str) -> HeldFolder:
    """The folder of a process that was killed: there, with its lock file, and locked by nobody."""
    held = HeldFolder(parent, prefix)
    (held.path / "checkpoint.pt").write_bytes(b"large")
    held._file.close()
    return held


@pytest.mark.processes
def test_a_killed_process_leaves_a_folder_that_the_next_one_removes(scratch: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    left = Path(owner.stdout.readline().strip())
    with scratch_folder(PREFIX):
        assert (left / "checkpoint.pt").is_file(), "its process lives"
    held_folders._swept.clear()
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    assert (left / "checkpoint.pt").is_file()
    with scratch_folder(PREFIX) as own:
        assert {path for path in scratch.iterdir() if path.is_dir()} == {own}
    assert list(scratch.iterdir()) == [], "nor does a lock stay"


def test_a_process_that_is_about_to_end_removes_its_own_and_those_of_its_dead_children(scratch: Path) -> None:
    with scratch_folder(PREFIX) as own, scratch_folder(PREFIX) as living:
        child = abandoned(scratch, own.name[:-32])
        remove_scratch(own)
        assert not own.exists() and not child.path.exists() and living.is_dir()


def test_another_machines_folders_are_left_alone(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as there:
        there.setattr("socket.gethostname", lambda: "elsewhere")
        with scratch_folder(PREFIX) as theirs:
            name = theirs.name.rpartition("-")[0] + "-"
    held = abandoned(scratch, name)
    with scratch_folder(PREFIX):
        assert (held.path / "checkpoint.pt").is_file()


def test_only_what_this_project_made_is_removed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_bytes(b"x")
    name = f"{PREFIX}{'0' * 32}"
    (tmp_path / name).symlink_to(precious)  # in the place of a folder
    (tmp_path / f"{name}.lock").touch()
    (tmp_path / f"{PREFIX}{'1' * 32}.lock").symlink_to(precious / "file")  # in the place of a lock
    (tmp_path / f"{PREFIX}{'1' * 32}").mkdir()
    (tmp_path / f"{PREFIX}notes.lock").touch()  # of another form
    (tmp_path / f"{PREFIX}notes").mkdir()
    (tmp_path / f"{PREFIX}{'2' * 32}").mkdir()  # without a lock: of an earlier version
    before = {path.name for path in tmp_path.iterdir()}
    remove_dead(tmp_path, PREFIX)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (precious / "file").read_bytes() == b"x"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_users_folders_are_left_alone(tmp_path: Path) -> None:
    held = abandoned(tmp_path, PREFIX)
    os.chown(held._lock_path, 12345, 12345)
    remove_dead(tmp_path, PREFIX)
    assert held.path.is_dir()


def test_a_folder_is_this_users_alone(scratch: Path) -> None:
    with scratch_folder(PREFIX) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_file_system_without_locks_keeps_what_nobody_can_tell_from_a_dead_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    held = HeldFolder(tmp_path, PREFIX)
    remove_dead(tmp_path, PREFIX)
    assert held.path.is_dir()
