"""Training images: bitwise equal to the reference and to torchvision; crops are uniform, each a function of seed and id."""

import itertools

import pytest
import torch

from spat_kernels import ops
from spat_kernels.ops.crop_flip import crops_ref
from tests.ops.helpers import bits_of, reference, sentinels

SIZES = [(1, 1), (5, 7), (17, 25)]
MOVES = [(0, False), (0, True), (4, True), (9, False)]  # pad and flip; 9 is beyond the small images
SEED = (0x0123456789ABCDEF, -5)
ROWS = [0, 6, 7, 3, -1, 2**62, 3]  # of seven images, three of these are not there
IDS = [0, 1, -1, 2**40 + 3, 5, 6, 2**63 - 1]


def pixels(*shape, device="cpu"):
    return torch.randint(256, shape, dtype=torch.uint8).to(device)


def vectors(device, *lists):
    return [torch.tensor(values, dtype=torch.int64, device=device) for values in lists]


def samples(dtype):
    images, out = torch.randint(256, (6, 32, 32, 3), dtype=torch.uint8), torch.empty(4, 3, 32, 32, dtype=dtype)
    rows, seed = torch.tensor([5, 0, 5, 2]), torch.tensor([1, 2])
    for to in (out, torch.empty_like(out, memory_format=torch.channels_last)):
        yield "crop_flip", (images, rows, rows + 4, seed, to, 2, True)
        yield "crop_flip", (images, rows, rows + 4, seed, to, 0, False)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_is_bitwise_the_reference(impl, channels):
    rows, ids, seed = vectors(impl.device, ROWS, IDS, SEED)
    sizes = SIZES[::2] if impl.interpreted else [*SIZES, (32, 32)]
    for size, dtype, last, offset, (pad, flip) in itertools.product(sizes, impl.dtypes, (False, True), impl.offsets, MOVES):
        images = pixels(7, *size, channels, device=impl.device)
        out, intact = sentinels((7, channels, *size), dtype, impl.device, offset, channels_last=last)
        expected = torch.empty_like(out)
        reference("crop_flip")(images, rows, ids, seed, expected, pad, flip)
        impl("crop_flip")(images, rows, ids, seed, out, pad, flip)
        case = size, dtype, last, offset, pad, flip
        assert torch.equal(bits_of(out), bits_of(expected)), case
        assert out.flatten(1).isnan().any(1).tolist() == out.flatten(1).isnan().all(1).tolist(), case
        assert out.flatten(1).isnan().all(1).tolist() == [False, False, True, False, True, True, False], case
        assert intact(), case


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_is_torchvision(impl, last):
    tv = pytest.importorskip("torchvision", reason="needs torchvision", exc_type=Exception).transforms.functional
    images = pixels(5, 13, 10, 3)
    rows, ids, seed = vectors("cpu", [3, 0, 4, 4, 1, 2], range(6), SEED)
    expected = []
    for row, dy, dx, flipped in zip(rows.tolist(), *(t.tolist() for t in crops_ref(ids, seed, 3, True)), strict=True):
        image = tv.crop(tv.pad(images[row].movedim(-1, 0), 3), dy, dx, 13, 10)
        image = tv.hflip(image) if flipped else image
        expected.append(tv.to_tensor(image.movedim(0, -1).numpy()))
    out, intact = sentinels((6, 3, 13, 10), torch.float32, impl.device, channels_last=last)
    impl("crop_flip")(*(t.to(impl.device) for t in (images, rows, ids, seed)), out, 3, True)
    assert torch.equal(out.cpu(), torch.stack(expected))
    assert intact()


def test_draws_by_hand():
    """Random123's known answer for zeros: 6627e8d5 e169c58d bc57ac4c."""
    zeros = torch.zeros(2, dtype=torch.int64)
    assert [t.item() for t in crops_ref(zeros[:1], zeros, 4, True)] == [3, 7, True]
    most = [word * (2**31 - 1) >> 32 for word in (0x6627E8D5, 0xE169C58D)]
    assert [t.item() for t in crops_ref(zeros[:1], zeros, 2**30 - 1, False)] == [*most, False]


def test_the_largest_pad(impl):
    images, (rows, ids, seed) = pixels(1, 4, 4, 3, device=impl.device), vectors(impl.device, [0, 0], [0, 1], SEED)
    out = torch.full((2, 3, 4, 4), torch.nan, device=impl.device)
    impl("crop_flip")(images, rows, ids, seed, out, 2**30 - 1, True)
    assert (out == 0).all()


def test_crops_and_flips_are_uniform(device):
    """Chi-square over the 5 * 5 * 2 outcomes, which the image's own values tell: below the 99.9 % quantile of 49 degrees."""
    n, pad = 20_000, 2
    images = torch.arange(1, 65, dtype=torch.uint8, device=device).view(1, 8, 8, 1)
    ids = torch.arange(n, device=device)
    for seed in vectors(device, [0, 0], [1, 0], [0, 1], SEED):
        out = ops.crop_flip(images, torch.zeros_like(ids), ids, seed, torch.empty(n, 1, 8, 8, device=device), pad=pad, flip=True)
        middle, right = ((out[:, 0, 4, w] * 255).round().long() - 1 for w in (4, 5))
        flipped = (right < middle).long()
        dy, dx = middle // 8 - 4 + pad, middle % 8 - (4 - flipped) + pad
        counts = torch.bincount((dy * 5 + dx) * 2 + flipped, minlength=50).double()
        assert len(counts) == 50
        assert ((counts - n / 50) ** 2 / (n / 50)).sum() < 85.35


def test_empty_batch(impl):
    empty, seed = vectors(impl.device, [], SEED)
    out = torch.empty(0, 3, 4, 4, device=impl.device)
    impl("crop_flip")(pixels(2, 4, 4, 3, device=impl.device), empty, empty, seed, out, 4, True)


def test_images_beyond_32_bits(impl, tmp_path):
    """More than 2^32 bytes; a mapped file on the CPU, whose holes take no space."""
    count, shape = 2**22 + 1, (32, 32, 1)
    size = count * 1024
    if impl.device == "cpu":
        images = torch.from_file(str(tmp_path / "images"), shared=True, size=size, dtype=torch.uint8)
    else:
        images = torch.zeros(size, dtype=torch.uint8, device=impl.device)
    images = images.view(count, *shape)
    images[-1] = 255
    rows, ids, seed = vectors(impl.device, [count - 1, 0, count], [0, 1, 2], SEED)
    out = torch.zeros(3, 1, 32, 32, device=impl.device)
    impl("crop_flip")(images, rows, ids, seed, out, 0, True)
    assert (out[0] == 1).all()
    assert (out[1] == 0).all()
    assert out[2].isnan().all()
