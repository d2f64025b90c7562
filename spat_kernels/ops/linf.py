"""L-infinity ball: random start and signed-gradient step, in place.

    start:  x_adv <- clamp(x + U(-eps, eps), lo, hi)
    step:   x_adv <- clamp(clamp(x_adv + step_size * sign(grad), x - eps, x + eps), lo, hi)        (Madry et al., Eq. 2.7)

x_adv, x, grad: [B, ...], dense, equal strides. x_adv and x share a dtype of {fp32, bf16, fp16, fp64}; grad has its own (fp64 goes
with fp64 alone). eps, step_size: [1] or [B] in fp32 (fp64 for fp64 images). Arithmetic is fp32 and rounds once, on the store.
sign(0) = sign(NaN) = 0; nan_seen, uint8 [B], is set to 1 for samples with a NaN gradient and never cleared.
A step moves 3 reads + 1 write of the image (16 bytes an element in fp32), a start 1 + 1.

hash, int64 [B]: to each sample's is added the sum, modulo 2^64, of mix(bits(x_adv_i) + (i + 1) * 0x9E3779B97F4A7C15) over its
elements in the order of the memory, where mix is the finaliser of splitmix64. A sum is the same in any order, so all backends
find the same bits. Equal samples have equal hashes. Two that differ have equal ones with a probability of about 2^-64, if mix is
taken for a random function, so two of T iterates that differ are taken for one with a probability of at most T^2 / 2^65.

Noise is Philox4x32-10 with key seed[0] and counter (memory offset // 4, seed[1]): a function of the seed alone, the same bits on
every backend. The same seed gives channels_last images other noise than contiguous ones.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import define
from ._common import EXACT, Maybe, broadcast, check_images, check_int64, check_step, clamp, per_sample, tl_acc

BLOCK = 1024
UNSIGNED = {2: tl.uint16, 4: tl.uint32, 8: tl.uint64}  # by the size of an element

# --- reference ---


def check_hash(hash: Maybe, x_adv: Tensor) -> None:
    if hash is not None:
        check_int64(len(x_adv), hash=hash)


def philox_at(seed: Tensor, index: Tensor) -> Tensor:
    """The four words that each of `index`, int64 [n], has in the stream of `seed`, as int64 [n, 4]."""
    low = 0xFFFFFFFF
    (k0, k1), (c2, c3) = ([v & low, (v >> 32) & low] for v in seed)
    c = [index & low, (index >> 32) & low, c2.expand_as(index), c3.expand_as(index)]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]  # wraps in int64, the bits are those of uint64
        c = [((b >> 32) & low) ^ c[1] ^ k0, b & low, ((a >> 32) & low) ^ c[3] ^ k1, a & low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack(c, dim=1)


def memory_order(t: Tensor) -> Tensor:
    """A view of the dense images `t` whose row-major order is the order in memory."""
    return t if t.is_contiguous() else t.movedim(1, -1)


def hash_ref(x: Tensor) -> Tensor:
    """The hash of each of the dense samples x [B, ...], int64 [B]."""

    def shifted(z: Tensor, bits: int) -> Tensor:
        return (z >> bits) & ((1 << (64 - bits)) - 1)  # without the sign, as in uint64

    def signed(word: int) -> int:
        return word - (word >> 63 << 64)

    flat = memory_order(x).flatten(1)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = flat.view(integers).long()
    bits = bits if x.element_size() == 8 else bits & ((1 << 8 * x.element_size()) - 1)
    place = torch.arange(1, flat.shape[1] + 1, device=x.device)
    z = bits + place * signed(0x9E3779B97F4A7C15)  # wraps in int64, the bits are those of uint64
    z = (z ^ shifted(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ shifted(z, 27)) * signed(0x94D049BB133111EB)
    return (z ^ shifted(z, 31)).sum(1)


def linf_random_start_ref(x_adv: Tensor, x: Tensor, eps: Tensor, seed: Tensor, lo: float, hi: float) -> None:
    check_images(x_adv, x, lo, hi, eps=eps)
    check_int64(2, seed=seed)
    flat = memory_order(x)
    calls = torch.arange(-(-x.numel() // 4), device=seed.device)
    words = philox_at(seed, calls).flatten()[: x.numel()].view(flat.shape)
    unit = (((words >> 8) * 2 + 1 - 2**24) * 2.0**-24).to(eps.dtype)
    memory_order(x_adv).copy_((flat.to(eps.dtype) + broadcast(eps, flat) * unit).clamp(lo, hi))


def linf_step_ref(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    eps: Tensor,
    step_size: Tensor,
    lo: float,
    hi: float,
    nan_seen: Maybe,
    hash: Maybe = None,
) -> None:
    check_step(x_adv, x, grad, eps, step_size, lo, hi, nan_seen)
    check_hash(hash, x_adv)
    eps, step_size = broadcast(eps, x), broadcast(step_size, x)
    moved = x_adv.to(eps.dtype) + step_size * grad.to(eps.dtype).sign().nan_to_num(0)
    x_adv.copy_(moved.clamp(x - eps, x + eps).clamp(lo, hi))
    if nan_seen is not None:
        nan_seen |= grad.isnan().flatten(1).any(1) if x.numel() else False
    if hash is not None and x.numel():
        hash += hash_ref(x_adv)


# --- Triton ---


@triton.jit
def linf_random_start_kernel(
    x_adv_ptr, x_ptr, eps_ptr, seed_ptr, numel, sample_numel, lo: tl.float64, hi: tl.float64,
    VARIES: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    i_call = tl.program_id(0).to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    counter = tl.load(seed_ptr + 1)
    r0, r1, r2, r3 = tl.philox(
        tl.load(seed_ptr),
        i_call.to(tl.uint32), (i_call >> 32).to(tl.uint32), counter.to(tl.uint32), (counter >> 32).to(tl.uint32),
    )  # fmt: skip
    b_word = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))
    b_unit = ((b_word >> 8).to(tl.int32) * 2 + 1 - 16777216).to(tl.float32) * 5.9604644775390625e-08
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    b_eps = per_sample(eps_ptr, o // sample_numel, m, VARIES)
    b_start = tl.load(x_ptr + o, mask=m).to(ACC) + b_eps * b_unit.to(ACC)
    tl.store(x_adv_ptr + o, clamp(b_start, tl.cast(lo, ACC), tl.cast(hi, ACC)), mask=m)


@triton.jit
def mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def linf_step_kernel(
    x_adv_ptr, x_ptr, grad_ptr, eps_ptr, step_ptr, nan_seen_ptr, hash_ptr, numel, sample_numel, lo: tl.float64, hi: tl.float64,
    EPS_VARIES: tl.constexpr, STEP_VARIES: tl.constexpr, COUNT_NAN: tl.constexpr, HASH: tl.constexpr, BITS: tl.constexpr,
    SAMPLES: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    i_sample = o // sample_numel
    b_eps, b_step = per_sample(eps_ptr, i_sample, m, EPS_VARIES), per_sample(step_ptr, i_sample, m, STEP_VARIES)
    b_adv, b_x = tl.load(x_adv_ptr + o, mask=m).to(ACC), tl.load(x_ptr + o, mask=m).to(ACC)
    b_grad = tl.load(grad_ptr + o, mask=m, other=0.0).to(ACC)
    if COUNT_NAN:
        tl.store(nan_seen_ptr + i_sample, tl.full([BLOCK], 1, tl.uint8), mask=m & (b_grad != b_grad))
    b_sign = (b_grad > 0).to(ACC) - (b_grad < 0).to(ACC)
    b_moved = clamp(b_adv + b_step * b_sign, b_x - b_eps, b_x + b_eps)
    b_moved = clamp(b_moved, tl.cast(lo, ACC), tl.cast(hi, ACC)).to(x_adv_ptr.dtype.element_ty)
    tl.store(x_adv_ptr + o, b_moved, mask=m)
    if HASH:
        b_bits = b_moved.to(BITS, bitcast=True).to(tl.uint64)
        b_hash = tl.where(m, mix(b_bits + (o - i_sample * sample_numel + 1).to(tl.uint64) * 0x9E3779B97F4A7C15), 0)
        if SAMPLES > 32:
            tl.atomic_add(hash_ptr + i_sample, b_hash.to(tl.int64, bitcast=True), mask=m)
        else:
            first = tl.program_id(0).to(tl.int64) * BLOCK // sample_numel
            for j in range(SAMPLES):  # that a block may have a part of
                b_sum = tl.sum(tl.where(i_sample == first + j, b_hash, 0)).to(tl.int64, bitcast=True)
                tl.atomic_add(hash_ptr + first + j, b_sum, mask=(first + j) * sample_numel < numel)


# --- launchers ---


def linf_random_start_triton(x_adv: Tensor, x: Tensor, eps: Tensor, seed: Tensor, lo: float, hi: float) -> None:
    check_images(x_adv, x, lo, hi, eps=eps)
    check_int64(2, seed=seed)
    if numel := x_adv.numel():
        with torch.cuda.device_of(x_adv):
            linf_random_start_kernel[(triton.cdiv(numel, BLOCK),)](
                x_adv, x, eps, seed, numel, numel // len(x), lo, hi,
                VARIES=eps.numel() > 1, BLOCK=BLOCK, ACC=tl_acc(x.dtype), **EXACT,
            )  # fmt: skip


def linf_step_triton(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    eps: Tensor,
    step_size: Tensor,
    lo: float,
    hi: float,
    nan_seen: Maybe,
    hash: Maybe = None,
) -> None:
    check_step(x_adv, x, grad, eps, step_size, lo, hi, nan_seen)
    check_hash(hash, x_adv)
    if numel := x_adv.numel():
        with torch.cuda.device_of(x_adv):
            linf_step_kernel[(triton.cdiv(numel, BLOCK),)](
                x_adv, x, grad, eps, step_size, nan_seen, hash, numel, numel // len(x), lo, hi,
                EPS_VARIES=eps.numel() > 1, STEP_VARIES=step_size.numel() > 1, COUNT_NAN=nan_seen is not None,
                HASH=hash is not None, BITS=UNSIGNED[x.element_size()],
                SAMPLES=0 if hash is None else BLOCK // (numel // len(x)) + 2, BLOCK=BLOCK, ACC=tl_acc(x.dtype), **EXACT,
            )  # fmt: skip


# --- registration ---

_random_start = define(
    "linf_random_start_(Tensor(a!) x_adv, Tensor x, Tensor eps, Tensor seed, float lo, float hi)",
    linf_random_start_ref,
    linf_random_start_triton,
)
_step = define(
    "linf_step_(Tensor(a!) x_adv, Tensor x, Tensor grad, Tensor eps, Tensor step_size, float lo, float hi, "
    "Tensor(b!)? nan_seen, Tensor(c!)? hash=None)",
    linf_step_ref,
    linf_step_triton,
)

# --- public ---


def linf_random_start_(x_adv: Tensor, x: Tensor, eps: Tensor, seed: Tensor, lo: float = 0.0, hi: float = 1.0) -> Tensor:
    """Write a uniform random start in the eps-ball around `x` and the box [lo, hi] into `x_adv`; returns `x_adv`.

    seed: int64 [2], the Philox key and counter. Shapes and dtypes: see the module. Raises RuntimeError where they do not fit.
    """
    _random_start(x_adv, x, eps, seed, lo, hi)
    return x_adv


def linf_step_(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    eps: Tensor,
    step_size: Tensor,
    lo: float = 0.0,
    hi: float = 1.0,
    nan_seen: Maybe = None,
    hash: Maybe = None,
) -> Tensor:
    """Step `x_adv` by `step_size * sign(grad)`, then project onto the eps-ball around `x` and the box; returns `x_adv`.

    Shapes and dtypes: see the module. Raises RuntimeError where they do not fit.
    """
    _step(x_adv, x, grad, eps, step_size, lo, hi, nan_seen, hash)
    return x_adv
