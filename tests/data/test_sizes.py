"""Sizes of training images: the grammar, which size holds when, and the resizing."""

import pytest
import torch

from spat_train.data.sizes import parse_sizes, resized, side_in
from spat_train.errors import InputError


def test_each_size_holds_from_its_epoch_on():
    sizes = parse_sizes("128@1, 192@3,224@6")
    assert sizes == ((128, 1), (192, 3), (224, 6))
    assert [side_in(sizes, epoch) for epoch in range(7)] == [128, 128, 192, 192, 192, 224, 224]
    assert parse_sizes(None) == ()
    assert side_in((), 3) is None
    assert parse_sizes("64@1,32@2") == ((64, 1), (32, 2))  # they may fall too


NO_SUCH = ["", "128", "128@0", "128@2", "128@1,192@1", "128@1,192@5,224@4", "7@1", "128@1,", "a@1", "-8@1"]


@pytest.mark.parametrize("text", NO_SUCH)
def test_what_is_no_such_text(text):
    with pytest.raises(InputError, match=rf"^--train-sizes {text}: give sides of at least 8, .*: 128@1,224@41$"):
        parse_sizes(text)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("side", [20, 32, 45])
def test_resized_as_torchvision_does(side, memory_format):
    functional = pytest.importorskip("torchvision.transforms.v2.functional", exc_type=Exception)
    x = torch.rand(3, 3, 32, 32).contiguous(memory_format=memory_format)
    x[0].fill_(1)
    found = resized(x, side)
    torch.testing.assert_close(found, functional.resize(x, [side, side], antialias=True), rtol=0, atol=1e-6)
    assert found.is_contiguous(memory_format=memory_format)
    assert found.max() <= 1
    assert (found is x) == (side == 32)


def test_means_of_blocks_stay():
    """Halved without antialiasing, a board of single pixels would become black or white."""
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * torch.ones(1, 1, 32, 32)
    assert (resized(board, 16)[..., 2:-2, 2:-2] - 0.5).abs().max() < 0.1


def test_nothing_to_resize():
    x = torch.rand(2, 3, 16, 16)
    assert resized(x, None) is x
    assert resized(x[:0], 8).shape == (0, 3, 16, 16)
