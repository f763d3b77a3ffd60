"""What a store is before it holds a slide: its spec, its opening, the arithmetic of its files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmil_fast.errors import StoreError
from hmil_fast.io.store import StoreSpec, create_store, open_store, slide_dirname
from hmil_fast.io.store.layout import chunk_rows, shard_rows, slide_id_of
from hmil_fast.io.store.restore import open_by_slides

SPEC = StoreSpec(16, "float16", {"name": "toy", "sha256": "0" * 64}, {"tile_px": 256, "mpp": 0.5})


@pytest.mark.parametrize("n", [1, 8, 500, 513, 3565, 37_752, 65_537, 1_000_000])
@pytest.mark.parametrize("row_bytes", [32, 2048, 5120])
def test_chunks_are_full_and_shards_are_bounded(n: int, row_bytes: int) -> None:
    chunk, shard = chunk_rows(n), shard_rows(n, row_bytes)
    assert chunk % 8 == 0
    assert chunk <= 512
    assert shard % chunk == 0
    assert shard <= 65_536
    assert shard * row_bytes <= 256 * 2**20
    assert -(-n // chunk) * chunk <= max(n + 7, n * 1.02 + 8)


def test_create_opens_an_equal_store_and_names_what_differs(tmp_path: Path) -> None:
    first = create_store(tmp_path, SPEC)
    assert create_store(tmp_path, replace(SPEC)).uuid == first.uuid
    other = replace(SPEC, dim=32, tiling={**SPEC.tiling, "mpp": 1.0})
    with pytest.raises(StoreError) as caught:
        create_store(tmp_path, other)
    assert "dim: 16 in the store, 32 asked for" in caught.value.what
    assert "tiling.mpp: 0.5 in the store, 1.0 asked for" in caught.value.what
    assert "--store" in caught.value.fix


def test_config_hash_ignores_order_and_knows_values() -> None:
    swapped = replace(SPEC, tiling={"mpp": 0.5, "tile_px": 256})
    assert swapped.config_hash == SPEC.config_hash
    assert replace(SPEC, tiling={"mpp": 0.25, "tile_px": 256}).config_hash != SPEC.config_hash


@pytest.mark.parametrize(
    "wrong", [{"dim": 0}, {"dim": 10**6}, {"dtype": "float64"}, {"encoder": {"x": float("nan")}}]
)
def test_specs_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(StoreError):
        replace(SPEC, **wrong)


def test_opening_what_is_no_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no feature store at"):
        open_store(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    for opening in (open_store, open_by_slides):
        with pytest.raises(StoreError, match="no feature store at"):
            opening(tmp_path / "file")
    for text, why in (
        ("{", "malformed"),
        ("[]", "malformed"),
        ('{"schema_version": 2}', "schema version 2"),
        ('{"schema_version": 1, "dim": true}', "'dim'"),
        ('{"schema_version": 1, "dim": NaN}', "NaN"),
        ("[" * 100_000, "malformed"),
    ):
        (tmp_path / "store.json").write_text(text)
        with pytest.raises(StoreError, match=why):
            open_store(tmp_path)


@given(slide_id=st.text(st.characters(codec=None), min_size=1, max_size=400))
def test_folder_names_are_safe_and_lead_back(slide_id: str) -> None:
    name = slide_dirname(slide_id)
    assert len(name.encode()) < 200
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.%~")
    assert not name.startswith(".")
    assert slide_id_of(name) == (None if "~" in name else slide_id)
