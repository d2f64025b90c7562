"""The network of the demo."""

from torch import Tensor, nn


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
        for out_channels, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            layers += [
                nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
            ]
            channels, height, image_width = out_channels, -(-height // stride), -(-image_width // stride)
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * height * image_width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] -> logits [B, K]."""
        # Centred, because all-positive inputs make the first layer slow to train.
        return self.classifier(self.features(2 * x - 1).flatten(1))
