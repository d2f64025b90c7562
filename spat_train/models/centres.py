"""Max-Mahalanobis centres as the classifier of any network (Pang et al., ICLR 2020, arXiv 1905.10626)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RADIUS = 10.0  # C_MM of the paper
DIMENSIONS = 256  # the size of the features, as in its code


def max_mahalanobis(classes: int, dimensions: int, radius: float = RADIUS) -> Tensor:
    """The corners of a regular simplex around 0: fp64 [K, d], norms `radius`, every pair at the cosine -1 / (K - 1).

    K points can be no further apart. They are the projections of the unit vectors of R^K along (1, ..., 1), in Helmert's basis.
    The paper constructs them one by one (Algorithm 1), which gives the same up to a rotation, which the layer before them learns.

    Raises:
        ValueError: there are more than d + 1 classes.
    """
    if not 2 <= classes <= dimensions + 1:
        raise ValueError(f"classes={classes}: {dimensions} dimensions have room for 2 to {dimensions + 1} centres: give more")
    row, column = torch.arange(classes)[:, None], torch.arange(1, classes, dtype=torch.float64)
    basis = torch.where(row < column, 1.0, torch.where(row == column, -column, 0.0)) / (column * (column + 1)).sqrt()
    return F.pad(basis * (radius * (classes / (classes - 1)) ** 0.5), (0, dimensions - classes + 1))


class CentreClassifier(nn.Module):
    """Logits z_k = -||f - mu_k||^2: a linear layer to features f in R^d, and fixed Max-Mahalanobis centres mu_k.

    The MMC loss is -z_y / 2, and cross-entropy on these logits a g-SCE loss, that of MMLDA. The centres are in the state
    dict, since the weights are right for them alone.

    Args:
        inputs: features of the network, which the linear layer reads.
        classes: K, from 2 to d + 1.
        dimensions: d.
        radius: C_MM, the norm of every centre.
        device, dtype: of the weights and the centres, as in `nn.Linear`.

    Raises:
        ValueError: there are too many classes.
    """

    centres: Tensor

    def __init__(self, inputs: int, classes: int, dimensions: int = DIMENSIONS, radius: float = RADIUS, device=None, dtype=None):
        super().__init__()
        self.radius = radius
        self.linear = nn.Linear(inputs, dimensions, device=device, dtype=dtype)
        nn.init.kaiming_normal_(self.linear.weight)  # as in the paper's code
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("centres", max_mahalanobis(classes, dimensions, radius).to(self.linear.weight))

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs] -> logits [B, K]."""
        f = self.linear(x)
        with torch.autocast(self.centres.device.type, enabled=False):  # what is left near a centre would vanish in half precision
            f = f.to(self.centres.dtype)
            return 2 * F.linear(f, self.centres) - self.radius**2 - f.square().sum(1, keepdim=True)


def put_centres(model: nn.Module, name: str, num_classes: int) -> None:
    """Put a `CentreClassifier` in the place of the linear layer of `model` that gives the logits. Messages call it `name`.

    There are 256 features, or K - 1 where there are more classes.

    Raises:
        ValueError: not exactly one layer is such.
    """
    # Not named_children(), which leaves out the second of two names for one module.
    linear = [(m, at, child) for m in model.modules() for at, child in m._modules.items() if type(child) is nn.Linear]
    places = [(m, at, layer) for m, at, layer in linear if layer.out_features == num_classes]
    layers = {layer for _, _, layer in places}
    if len(layers) != 1:
        raise ValueError(
            f"classifier='centres': {name} has {len(layers)} layers nn.Linear of {num_classes} outputs, one of which to replace: "
            "give 'linear', or a model with one"
        )
    (layer,) = layers
    dimensions, weight = max(DIMENSIONS, num_classes - 1), layer.weight
    head = CentreClassifier(layer.in_features, num_classes, dimensions, device=weight.device, dtype=weight.dtype)
    for m, at, _ in places:
        setattr(m, at, head)
