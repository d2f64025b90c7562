"""The steps of an input-gradient plan: what each reads, writes and fuses. They hold no tensor."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields

from torch import Tensor, nn

from .nodes import Act, Constant, Norm, Term

Maps = tuple[Norm | Term, ...]


@dataclass
class Step:
    """One step: reads the values `inputs`, writes the value `out`. `frees` are the values that nobody reads after it."""

    inputs: tuple[int, ...]
    out: int
    name: str
    shape: tuple[int, ...]  # one sample of `out`
    frees: list[int] = field(default_factory=list)


@dataclass(kw_only=True)
class Conv(Step):
    weight: Constant
    bias: Constant | None
    conv: dict
    before: Maps = ()  # affine maps of the image, done while it is read
    after: Maps = ()  # affine maps folded into weight and bias
    shift_moves: bool = False  # the folded bias is added by the Pointwise that reads `out`


@dataclass(kw_only=True)
class FusedConv(Conv):
    """A convolution with passes next to it, which an engine may do in the same launch (`fused_conv`). Else each is done alone."""

    behind: int | None = None  # the Pointwise step that reads `out`
    shared: bool = False  # others read `out` too: it is the total of that pass
    in_front: int | None = None  # the Pointwise step whose way back is done with the gradient of this convolution

    def plain(self) -> Conv:
        """The convolution by itself."""
        return Conv(**{f.name: getattr(self, f.name) for f in fields(Conv)})


@dataclass
class Pointwise(Step):
    affine: Maps = ()
    relu: bool = False
    act: Act | None = None  # instead of ReLU
    total: int | None = None  # the value inputs[0] (+ inputs[1]), where somebody else reads it
    shifts: tuple[int, ...] = ()  # steps whose bias moved here
    in_place: bool = False  # inputs[0] is the output of a convolution or linear layer that nobody else reads
    in_head: bool = False  # its way back is done by the PoolLinear behind it
    alone: str = ""  # why it is done by itself, if it is
    back_alone: str = ""
    channels: int = 0  # the dimension of a sample that `affine` goes along, innermost in memory

    @property
    def of_images(self) -> bool:
        """Whether values are [B, C, H, W] or [B, C]. Others are read as rows of channels."""
        return self.channels == 0 and len(self.shape) in (1, 3)


@dataclass(kw_only=True)
class Linear(Step):
    weight: Constant
    bias: Constant | None
    after: Maps = ()  # affine maps of tokens, folded into weight and bias


@dataclass(kw_only=True)
class PoolLinear(Linear):
    pointwise: int | None = None  # the step whose way back is done here


@dataclass
class Mean(Step):
    dims: tuple[int, ...] = (2, 3)
    gates: int | None = None  # the value of a product with what is pooled, whose step leaves its gradient here


@dataclass
class Reshape(Step):
    pass


@dataclass(kw_only=True)
class Local(Step):
    function: Callable[..., Tensor]  # of the values of `inputs` and of the constants
    constants: tuple[Constant, ...] = ()


@dataclass
class Multiply(Step):
    """The product of two values, one of which may be broadcast: squeeze-and-excitation."""

    pooled: bool = False  # the gradient of inputs[0] is completed by the `Mean` that the other factor was made from


@dataclass(kw_only=True)
class Cat(Step):
    """Values and constants one behind the other."""

    dim: int
    parts: tuple[int | Constant, ...]  # positions in `inputs`, and constants
    channels: int

    @property
    def of_channels(self) -> bool:
        """Whether it joins the channels of images, and nothing else."""
        return len(self.shape) == 3 and self.dim == 1 and len(self.parts) == len(self.inputs)


@dataclass(kw_only=True)
class Index(Step):
    """A part of a value."""

    items: tuple
    group: int = 1  # how many parts of one value this is one of: together they are all of it, and nobody else reads it

    @property
    def of_channels(self) -> bool:
        """Whether it takes channels of images, and all of their pixels."""
        alike = len(self.shape) == 3 and all(isinstance(i, slice) for i in self.items)
        return alike and all(i == slice(None) for k, i in enumerate(self.items) if k != 1)


@dataclass(kw_only=True)
class Pad(Step):
    """By a constant; negative sides are cut off."""

    sides: tuple[int, ...]  # as torch.nn.functional.pad has them
    value: float


@dataclass(kw_only=True)
class Pool(Step):
    pool: nn.Module


@dataclass(kw_only=True)
class GroupNorm(Step):
    groups: int
    eps: float


@dataclass(kw_only=True)
class ResponseNorm(Step):
    """Global response normalisation, over all pixels of each of the `channels`, a dimension of the sample."""

    weight: Constant
    bias: Constant
    eps: float
    channels: int
