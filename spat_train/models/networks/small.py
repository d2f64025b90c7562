"""Small networks: those of the papers for MNIST, and the demo's."""

from collections import OrderedDict

from torch import Tensor, nn

from . import register


@register("small-cnn")
class SmallCNN(nn.Module):
    """Three 3x3 convolutions with BatchNorm, the last two of stride 2, and a linear classifier.

    Args:
        image_shape: (C, H, W) of one image, H and W at least 8.
        num_classes: K.
        width: channels of the first convolution, doubled by each of the next two.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, width: int = 16):
        super().__init__()
        channels, height, image_width = image_shape
        layers = []
        for outs, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            convolution = nn.Conv2d(channels, outs, 3, stride=stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outs), nn.ReLU()]
            channels, height, image_width = outs, -(-height // stride), -(-image_width // stride)
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * height * image_width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] -> logits [B, K]."""
        # Centred, because all-positive inputs make the first layer slow to train.
        return self.classifier(self.features(2 * x - 1).flatten(1))


@register("mnist-cnn (also with /WIDTH)", r"mnist-cnn(?:/(?P<scale>[1-9]\d{0,2}))?", names=("mnist-cnn",), variant="16")
class MnistCNN(nn.Module):
    """Madry et al.'s network for MNIST (arXiv 1706.06083): two 5x5 convolutions, each max-pooled, and two dense layers.

    PyTorch's initialisation: with that of their code, N(0, 0.1), 2,000 images and 500 steps are not enough to begin to learn.
    3,274,634 parameters for MNIST.

    Args:
        image_shape: (C, H, W) of one image, H and W divisible by 4.
        num_classes: K.
        scale: 2 and 4 filters and 64 units, times this: their Figure 4 goes from 1 to 16, the network of their Table 1.
    """

    def __init__(self, image_shape: tuple[int, int, int] = (1, 28, 28), num_classes: int = 10, scale: int = 16):
        super().__init__()
        channels, height, width = image_shape
        if height % 4 or width % 4:
            raise ValueError(f"image_shape={image_shape}: mnist-cnn halves images twice: pad them to sides divisible by 4")
        first = nn.Conv2d(channels, 2 * scale, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)
        second = nn.Conv2d(2 * scale, 4 * scale, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)
        self.features = nn.Sequential(*first, *second)
        self.fc1 = nn.Linear(4 * scale * (height // 4) * (width // 4), 64 * scale)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(64 * scale, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        return self.fc2(self.relu(self.fc1(self.features(x).flatten(1))))


@register("mnist-b")
class MnistB(nn.Module):
    """Architecture B of Tramèr et al. for MNIST (arXiv 1705.07204, Appendix A), from which Madry et al. attack in the black box.

    Images are at least 28x28.
    """

    def __init__(self, image_shape: tuple[int, int, int] = (1, 28, 28), num_classes: int = 10):
        super().__init__()
        channels, *sides = image_shape
        left = [(side // 2 - 6) // 2 + 1 - 4 for side in sides]
        if min(left) < 1:
            raise ValueError(f"image_shape={image_shape}: mnist-b needs images of at least 28x28")
        first = nn.Dropout(0.2), nn.Conv2d(channels, 64, 8, stride=2, padding=3), nn.ReLU()
        others = nn.Conv2d(64, 128, 6, stride=2), nn.ReLU(), nn.Conv2d(128, 128, 5), nn.ReLU(), nn.Dropout(0.5)
        self.features = nn.Sequential(*first, *others)
        self.fc = nn.Linear(128 * left[0] * left[1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        return self.fc(self.features(x).flatten(1))


@register("mnist-trades")
class TradesCNN(nn.Module):
    """TRADES' network for MNIST (its code calls it SmallCNN): four 3x3 convolutions, two max-pools and three dense layers.

    Parameters have the names of its public checkpoint. PyTorch's initialisation. Images are at least 16x16.
    """

    def __init__(self, image_shape: tuple[int, int, int] = (1, 28, 28), num_classes: int = 10):
        super().__init__()
        channels, *sides = image_shape
        left = [((side - 4) // 2 - 4) // 2 for side in sides]
        if min(left) < 1:
            raise ValueError(f"image_shape={image_shape}: mnist-trades needs images of at least 16x16")
        self.feature_extractor = nn.Sequential(OrderedDict(
            conv1=nn.Conv2d(channels, 32, 3), relu1=nn.ReLU(), conv2=nn.Conv2d(32, 32, 3), relu2=nn.ReLU(),
            maxpool1=nn.MaxPool2d(2),
            conv3=nn.Conv2d(32, 64, 3), relu3=nn.ReLU(), conv4=nn.Conv2d(64, 64, 3), relu4=nn.ReLU(),
            maxpool2=nn.MaxPool2d(2),
        ))  # fmt: skip
        self.classifier = nn.Sequential(OrderedDict(
            fc1=nn.Linear(64 * left[0] * left[1], 200), relu1=nn.ReLU(), drop=nn.Dropout(0.5),
            fc2=nn.Linear(200, 200), relu2=nn.ReLU(), fc3=nn.Linear(200, num_classes),
        ))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        return self.classifier(self.feature_extractor(x).flatten(1))
