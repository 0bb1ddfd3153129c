# SPDX-License-Identifier: Apache-2.0
from itertools import islice

import pytest
import torch

from tests.toy.blocks import pack_blocks, shuffled_batches


def test_blocks_hold_the_documents_one_after_another():
    blocks = pack_blocks([[0, 1, 2], [3], [], [4, 5, 6, 7, 8, 9, 10]], length=3)
    assert blocks.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert blocks.dtype == torch.int64


def test_documents_that_fill_no_block_are_refused():
    with pytest.raises(ValueError, match="3 tokens do not fill one block of 4"):
        pack_blocks([[1, 2, 3]], length=4)


def test_each_pass_holds_every_block_once_in_an_order_of_its_own():
    blocks = torch.arange(10)[:, None]
    batches = list(islice(shuffled_batches(blocks, batch_size=4, seed=0), 6))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    first, second = torch.cat(batches[:3]).flatten(), torch.cat(batches[3:]).flatten()
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert not torch.equal(first, second)


def test_the_order_follows_from_the_seed():
    blocks = torch.arange(100)[:, None]
    orders = [torch.cat(list(islice(shuffled_batches(blocks, 10, seed), 10))) for seed in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
