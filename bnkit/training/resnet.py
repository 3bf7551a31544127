"""A small residual network with BatchNorm in the usual places."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    # no bias: BatchNorm, which follows every convolution, would take it off again
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``, with 3 x 3 convolutions.

    The shortcut is the identity, or a 1 x 1 convolution and BatchNorm where the shape changes (option B of the paper).

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        stride: Stride of the first convolution: the output has ``1 / stride`` of the height and width.
        dropout: Probability of dropout before the second convolution (Zagoruyko & Komodakis, "Wide Residual Networks",
            2016, section 2.4).

    Shape:
        ``(samples, inputs, height, width)`` to ``(samples, outputs, ceil(height / stride), ceil(width / stride))``.

    Source:
        He et al., "Deep Residual Learning for Image Recognition", 2016, section 3.3 and figure 5 (left).
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.dropout: nn.Module = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = _convolution(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output, see the class."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(self.dropout(y)))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network for small images: a 3 x 3 stem, stages of basic blocks, average pooling, one linear layer.

    Each stage after the first has half the height and width of the one before and twice its channels. The network has
    ``1 + 2 * sum(depths) + len(depths) - 1`` BatchNorm layers: one in the stem, two in a block, one in a shortcut that
    changes the shape.

    Args:
        in_channels: Channels of the images.
        num_classes: Classes to tell apart.
        width: Channels of the stem and of the first stage.
        depths: Blocks in each stage.
        dropout: Probability of dropout within each block. (The running variance of the BatchNorm after it is then too
            large for inference.)

    Raises:
        ValueError: When a number is not positive or ``depths`` is empty.

    Shape:
        ``(samples, in_channels, height, width)`` to logits ``(samples, num_classes)``.

    Source:
        He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2 (the CIFAR-10 networks, here with
        option B shortcuts). Convolutions start as in He et al., "Delving Deep into Rectifiers", 2015 (fan out).
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        num_classes: int = 10,
        width: int = 16,
        depths: Sequence[int] = (1, 1, 1),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(in_channels, num_classes, width, *depths, len(depths)) < 1:
            raise ValueError(
                f"ResNet needs positive numbers and at least one stage; got in_channels={in_channels}, "
                f"num_classes={num_classes}, width={width}, depths={list(depths)}."
            )
        self.stem = nn.Sequential(_convolution(in_channels, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        stages: list[nn.Module] = []
        channels = width
        for index, depth in enumerate(depths):
            outputs = width * 2**index
            blocks = [
                BasicBlock(channels if block == 0 else outputs, outputs, 2 if index > 0 and block == 0 else 1, dropout)
                for block in range(depth)
            ]
            stages.append(nn.Sequential(*blocks))
            channels = outputs
        self.stages = nn.Sequential(*stages)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, see the class."""
        return cast("torch.Tensor", self.head(self.stages(self.stem(x))))
