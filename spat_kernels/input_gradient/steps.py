"""The steps of an input-gradient plan: what each reads, writes and fuses. They hold no tensor."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields

from torch import Tensor, nn

from .nodes import Act, Norm, Ref, Term

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
    weight: Ref
    bias: Ref | None
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
    in_place: bool = False  # inputs[0] is a convolution's output that nobody else reads
    in_head: bool = False  # its way back is done by the PoolLinear behind it
    alone: str = ""  # why it is done by itself, if it is
    back_alone: str = ""


@dataclass(kw_only=True)
class Linear(Step):
    weight: Ref
    bias: Ref | None


@dataclass(kw_only=True)
class PoolLinear(Linear):
    pointwise: int | None = None  # the step whose way back is done here


@dataclass
class Mean(Step):
    gates: int | None = (
        None  # what is pooled is multiplied later: by the step that writes this value, which leaves its product here
    )


@dataclass
class Reshape(Step):
    pass


@dataclass(kw_only=True)
class Local(Step):
    function: Callable[..., Tensor]


@dataclass
class Multiply(Step):
    """The product of two values, one of which may be broadcast: squeeze-and-excitation."""

    pooled: bool = False  # the gradient of inputs[0] is completed by the `Mean` that the other factor was made from


@dataclass
class Cat(Step):
    """Values one behind the other along the channels."""


@dataclass(kw_only=True)
class Split(Step):
    """Some channels of a value, [first, last) for each value that is made: `outs`, of which `out` is the first."""

    outs: tuple[int, ...]
    bounds: tuple[tuple[int, int], ...]


@dataclass(kw_only=True)
class Pad(Step):
    sides: tuple[int, int, int, int]  # left, right, top, bottom
    value: float


@dataclass(kw_only=True)
class Pool(Step):
    pool: nn.Module


@dataclass(kw_only=True)
class GroupNorm(Step):
    groups: int
    eps: float
