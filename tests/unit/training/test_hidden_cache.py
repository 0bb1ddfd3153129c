# SPDX-License-Identifier: Apache-2.0
import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vllm_medusa.files import WriteError
from vllm_medusa.training.hidden_cache import INDEX_FILE, CacheKey, HiddenCache

KEY = CacheKey(target="t", data="d", blocks=5, length=3, hidden_size=4, top_tokens=2)
COLUMNS = ("hidden", "top_tokens", "top_log_probs")


def outputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2**20, (KEY.blocks, KEY.length, KEY.top_tokens), generator=generator)
    log_probs = -torch.rand(tokens.shape, generator=generator)
    hidden = torch.randn(KEY.blocks, KEY.length, KEY.hidden_size, generator=generator)
    return {"hidden": hidden, "top_tokens": tokens, "top_log_probs": log_probs}


def append(cache: HiddenCache, rows: slice) -> None:
    cache.append({name: tensor[rows] for name, tensor in outputs().items()})


def assert_complete(cache: HiddenCache) -> None:
    assert cache.complete
    expected = outputs()
    for row in (4, 0, 3, 1, 2):
        block = cache.block(row, COLUMNS)
        assert torch.equal(block["hidden"], expected["hidden"][row].bfloat16())
        assert torch.equal(block["top_tokens"], expected["top_tokens"][row].int())
        assert torch.equal(block["top_log_probs"], expected["top_log_probs"][row].half())


def test_what_is_written_is_read_back_in_any_order_by_another_process_too(tmp_path):
    with HiddenCache.locked(tmp_path / "new" / "cache", KEY) as cache:
        assert cache.done == 0
        cache.begin()
        append(cache, slice(0, 2))
        append(cache, slice(2, 5))
    assert_complete(cache)
    assert_complete(HiddenCache(tmp_path / "new" / "cache", KEY))
    assert cache.num_bytes == sum(file.stat().st_size for file in (tmp_path / "new" / "cache").glob("*.bin"))


@pytest.mark.parametrize("cut", [1, 7])
@pytest.mark.parametrize("column", COLUMNS)
def test_a_killed_writer_leaves_whole_blocks_and_the_next_one_goes_on(tmp_path, column, cut):
    cache = HiddenCache(tmp_path, KEY)
    cache.begin()
    append(cache, slice(0, 3))
    with (tmp_path / f"{column}.bin").open("r+b") as file:
        file.truncate((tmp_path / f"{column}.bin").stat().st_size - cut)
    again = HiddenCache(tmp_path, KEY)
    assert again.done == 2
    again.begin()
    append(again, slice(2, 5))
    assert_complete(again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "u"}, "of another target, or of the same in another dtype or precision"),
        ({"data": "e"}, "of other data, or of the same packed or split in another way"),
        ({"length": 4, "data": "e", "blocks": 4}, r"of blocks of another length \(block_length\)"),
    ],
)
def test_a_cache_of_something_else_is_refused_and_kept(tmp_path, change, message):
    HiddenCache(tmp_path, KEY).begin()
    with pytest.raises(ValueError, match=f"{tmp_path} holds hidden states {message}; give another cache_directory"):
        HiddenCache(tmp_path, replace(KEY, **change))
    assert HiddenCache(tmp_path, KEY).done == 0


def test_a_cache_without_probabilities_is_refused_where_they_are_wanted_and_one_with_them_serves_both(tmp_path):
    HiddenCache(tmp_path / "without", replace(KEY, top_tokens=0)).begin()
    with pytest.raises(ValueError, match="holds no log-probabilities, from which heads_loss 'kl' learns; give another"):
        HiddenCache(tmp_path / "without", KEY)
    HiddenCache(tmp_path / "with", KEY).begin()
    cache = HiddenCache(tmp_path / "with", replace(KEY, top_tokens=0))
    append(cache, slice(0, 5))
    assert_complete(cache)


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / INDEX_FILE).write_text(json.dumps({"rows": 3}))
    with pytest.raises(ValueError, match=r"cache\.json is not of a cache of hidden states; give another"):
        HiddenCache(tmp_path, KEY)


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**30))
    HiddenCache(tmp_path, KEY).check_room()
    large = replace(KEY, blocks=10**9)
    with pytest.raises(
        ValueError, match=r"cache_hidden needs 55\.88 GiB more in .*, where 1\.00 GiB are free; make room"
    ):
        HiddenCache(tmp_path, large).check_room()
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_names_the_directory(tmp_path, monkeypatch):
    cache = HiddenCache(tmp_path, KEY)
    cache.begin()

    def full(self: Path, mode: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(WriteError, match=rf"{tmp_path} cannot be written \(No space left on device\); make room"):
        append(cache, slice(0, 1))
