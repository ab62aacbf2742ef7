import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.digests import canonical_json, digest_of, is_sha256, sha256_bytes, sha256_file

VALUE = {"b": [1, 2.5, None, True], "a": {"z": "ü✓", "y": -0.1, "x": 10**20}, "": []}


def test_digest_does_not_depend_on_the_order_of_keys() -> None:
    reordered = {"": [], "a": {"x": 10**20, "y": -0.1, "z": "ü✓"}, "b": [1, 2.5, None, True]}
    assert canonical_json(VALUE) == canonical_json(reordered)
    assert digest_of(VALUE) == digest_of(reordered)


def test_canonical_json_is_sorted_compact_utf8_that_json_reads_back() -> None:
    assert canonical_json({"b": 1, "a": "ü"}) == '{"a":"ü","b":1}'.encode()
    assert json.loads(canonical_json(VALUE)) == VALUE


def test_digest_is_the_same_in_processes_with_other_hash_seeds(start_python: Callable[..., Any]) -> None:
    code = (
        "import sys\nfrom storage.digests import digest_of\n"
        "keys = {'alpha', 'beta', 'gamma', 'delta', 'epsilon'}\n"  # a set's order follows the hash seed
        "print(digest_of({key: {other: 1 for other in keys} for key in keys}))"
    )
    children = [start_python(code, PYTHONHASHSEED=seed) for seed in ("0", "1", "4242")]
    outputs = {child.communicate()[0].strip() for child in children}
    assert len(outputs) == 1
    assert is_sha256(outputs.pop())


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": {"b": [1, float("nan")]}}, "$.a.b[1]"),
        ({"a": float("inf")}, "$.a"),
        ({"a": {1: "x"}}, "$.a"),
        ({"a": (1, 2)}, "$.a"),
        ([Path("x")], "$[0]"),
        ({"a": b"bytes"}, "$.a"),
        ({"a": {1, 2}}, "$.a"),
        (["\ud800"], "$[0]"),
    ],
)
def test_what_json_cannot_hold_is_refused_with_its_place(value: Any, place: str) -> None:
    with pytest.raises(ValueError, match="^" + place.replace("$", r"\$").replace("[", r"\[") + r"(\s|:)"):
        canonical_json(value)


def test_values_that_differ_in_type_alone_have_different_digests() -> None:
    spellings = [1, 1.0, "1", True, [1], {"1": 1}, None]
    assert len({digest_of(value) for value in spellings}) == len(spellings)


def test_file_digest_equals_that_of_its_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()
