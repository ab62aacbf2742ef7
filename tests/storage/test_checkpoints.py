import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.store import Store

Damage = Callable[[Store, str, bytes], None]


def save(store: Store, step: int, tmp_path: Path, key: str = "key", keep: int = 1) -> None:
    folder = tmp_path / f"written-{step}"
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "model.pt").write_bytes(f"model {step}".encode() * 100)
    (folder / "sub" / "rng.bin").write_bytes(f"rng {step}".encode())
    store.work(key).save_checkpoint(step, folder, keep=keep)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def expected(step: int) -> dict[str, bytes]:
    return {"model.pt": f"model {step}".encode() * 100, "sub/rng.bin": f"rng {step}".encode()}


def test_the_newest_checkpoint_comes_back_and_older_ones_are_gone(store: Store, tmp_path: Path) -> None:
    assert store.work("key").load_checkpoint(tmp_path / "nothing") is None
    for step in (9, 10, 100):
        save(store, step, tmp_path)
    save(store, 7, tmp_path, key="other")
    assert store.work("key").load_checkpoint(tmp_path / "loaded") == 100
    assert files(tmp_path / "loaded") == expected(100)
    assert len(store.objects.list("checkpoints/key/")) == 3
    store.work("key").drop_checkpoints()
    assert store.work("key").load_checkpoint(tmp_path / "dropped") is None
    assert store.work("other").load_checkpoint(tmp_path / "other") == 7


def test_saving_a_step_again_replaces_it(store: Store, tmp_path: Path) -> None:
    save(store, 5, tmp_path)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "only").write_bytes(b"new")
    store.work("key").save_checkpoint(5, tmp_path / "again")
    assert store.work("key").load_checkpoint(tmp_path / "loaded") == 5
    assert files(tmp_path / "loaded") == {"only": b"new"}
    assert len(store.objects.list("checkpoints/key/")) == 2


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing", "unfinished", "garbage"])
def test_a_damaged_newest_checkpoint_is_skipped_for_an_older_one(
    kind: str, store: Store, tmp_path: Path, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, 10, tmp_path, keep=2)
    save(store, 20, tmp_path, keep=2)
    (model,) = [k for k in store.objects.list("checkpoints/key/000000000020/") if k.endswith("model.pt")]
    data = store.objects.read(model)
    complete = "checkpoints/key/000000000020/complete.json"
    key, bad = {
        "flipped": (model, bytes([data[0] ^ 1]) + data[1:]),
        "truncated": (model, data[:-1]),
        "missing": (model, b""),
        "unfinished": (complete, b""),
        "garbage": (complete, b"{"),
    }[kind]
    damage(store, key, bad)
    with caplog.at_level(logging.WARNING):
        assert store.work("key").load_checkpoint(tmp_path / "loaded") == 10
    assert files(tmp_path / "loaded") == expected(10)
    assert ("skipped the damaged checkpoint of step 20" in caplog.text) == (kind != "unfinished")
    save(store, 20, tmp_path, keep=2)
    assert store.work("key").load_checkpoint(tmp_path / "repaired") == 20
    assert files(tmp_path / "repaired") == expected(20)


def test_nothing_is_loaded_when_every_checkpoint_is_damaged(local_store: Store, tmp_path: Path, damage: Damage) -> None:
    save(local_store, 1, tmp_path)
    for key in local_store.objects.list("checkpoints/key/"):
        if key.endswith("model.pt"):
            damage(local_store, key, b"bad")
    assert local_store.work("key").load_checkpoint(tmp_path / "loaded") is None
    assert files(tmp_path / "loaded") == {}


def test_a_folder_without_files_is_no_checkpoint(local_store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no files"):
        local_store.work("key").save_checkpoint(1, tmp_path / "empty")
