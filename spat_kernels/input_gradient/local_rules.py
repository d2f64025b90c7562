"""The rules for what is left to autograd: functions and modules without parameters of their own, each differentiated alone."""

import copy

import torch.utils._pytree as pytree
from torch import Tensor

from .nodes import CannotPlan, Network


def local_module(net: Network, n, x, m):
    m = copy.deepcopy(m)  # it has no parameters
    if getattr(m, "inplace", False):
        m.inplace = False  # the plan may still need what it reads
    net.add(n, "local", x, function=m)


def local(function):
    """A rule that leaves `function` to autograd, with every argument but the values as it is now."""

    def rule(net: Network, n, *args, **kwargs):
        kwargs.pop("inplace", None)
        leaves, tree = pytree.tree_flatten((args, kwargs))
        places = [i for i, a in enumerate(leaves) if net.is_value(a)]
        values = [leaves[i] for i in places]
        constants = [None if i in places else net.plain(a) for i, a in enumerate(leaves)]
        if any(isinstance(c, Tensor) for c in constants):
            raise CannotPlan(f"{n.name} combines values with a tensor that is neither one number nor one for each channel")

        def call(*tensors):
            given = constants.copy()
            for i, t in zip(places, tensors, strict=True):
                given[i] = t
            real_args, real_kwargs = pytree.tree_unflatten(given, tree)
            return function(*real_args, **real_kwargs)

        net.add(n, "local", *values, function=call)

    return rule
