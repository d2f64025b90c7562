"""The rules for what is left to autograd: functions and modules without parameters of their own, each differentiated alone."""

import copy

import torch.utils._pytree as pytree

from .nodes import CannotPlan, Network


def local_module(net: Network, n, x, m):
    m = copy.deepcopy(m)  # it has no parameters
    if getattr(m, "inplace", False):
        m.inplace = False  # the plan may still need what it reads
    net.add(n, "local", x, function=m)


def local(function):
    """A rule that leaves `function` to autograd, with every argument but values and constants as it is now."""

    def rule(net: Network, n, *args, **kwargs):
        kwargs.pop("inplace", None)
        leaves, tree = pytree.tree_flatten((args, kwargs))
        places = [i for i, a in enumerate(leaves) if net.is_value(a)]
        values = [leaves[i] for i in places]
        tensors = [i for i, a in enumerate(leaves) if net.is_tensor(a)]
        for i in tensors:
            if len(net.plain(leaves[i]).shape) > net.result.ndim:
                raise CannotPlan(f"{n.name} combines values with a tensor of more dimensions")
        given = [None if i in places + tensors else net.plain(a) for i, a in enumerate(leaves)]
        if len(net.result) != len(net.probe):
            raise CannotPlan(f"{n.name} has shape {tuple(net.result.shape)} for a batch of {len(net.probe)}: samples may mix")

        def call(*values_and_constants):
            full = given.copy()
            for i, t in zip(places + tensors, values_and_constants, strict=True):
                full[i] = t
            real_args, real_kwargs = pytree.tree_unflatten(full, tree)
            return function(*real_args, **real_kwargs)

        net.add(n, "local", *values, function=call, constants=tuple(net.ref(leaves[i]) for i in tensors))

    return rule
