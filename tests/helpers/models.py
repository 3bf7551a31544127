"""Networks of the kinds that people use, small, each with batches as its loader would give them.

For `tests/test_models.py`: `CASES` is its table. What bnkit is known not to reach or to refuse in a network stands
beside it, and is tested like the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Case:
    """A network, and what is to be known of it.

    Attributes:
        build: makes it, in training mode.
        batches: makes three batches of 6 samples, as a loader gives them.
        kept: layers that a recalibration leaves as they are, and a part of the reason that it gives.
        unseen: layers that a training forward does not reach on any of the batches.
        refused: spec's name -> the pattern of the layers that swap refuses it for, and a part of the message; "*" is
            all specs, or all layers.
        twin: makes the same network in a form that runs in training mode on a CPU, where it does not itself.
    """

    build: Callable[[], nn.Module]
    batches: Callable[[], list[Any]]
    kept: Mapping[str, str] = field(default_factory=dict)
    unseen: tuple[str, ...] = ()
    refused: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    twin: Callable[[], nn.Module] | None = None


def tensors(*shape: int, dtype: torch.dtype = torch.float32, kind: Callable[[Tensor], Any] = lambda x: x) -> list[Any]:
    """Three batches of 6, each with another mean."""
    generator = torch.Generator().manual_seed(7)
    means = (0.2, 0.9, 0.5)
    return [kind((torch.randn(6, *shape, generator=generator) + mean).to(dtype)) for mean in means]


def double_convolution(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
        nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
    )  # fmt: skip


class UNet(nn.Module):
    """Segmentation: a way down, a way up by transposed convolutions, and skip connections."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.down1, self.down2 = double_convolution(2, width), double_convolution(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.up_bn = nn.BatchNorm2d(width)
        self.merge = double_convolution(2 * width, width)
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x):
        skip = self.down1(x)
        x = self.down2(F.max_pool2d(skip, 2))
        x = self.up_bn(self.up(x)).relu()
        return self.head(self.merge(torch.cat([skip, x], 1)))


class Pyramid(nn.Module):
    """Detection: a feature at each of three strides, made alike by convolutions with BatchNorm of their own."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(2 if i == 0 else width, width, 3, 2, 1) for i in range(3))
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)) for _ in range(3)
        )

    def forward(self, x):
        features = []
        for stage in self.stages:
            x = stage(x).relu()
            features.append(x)
        outputs = [lateral(feature) for lateral, feature in zip(self.laterals, features, strict=True)]
        for level in (1, 0):
            outputs[level] = outputs[level] + F.interpolate(outputs[level + 1], outputs[level].shape[2:])
        return outputs


class SharedHead(nn.Module):
    """One head for all levels of the pyramid, its BatchNorm with it: called three times in a forward."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.neck = Pyramid(width)
        self.tower = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.boxes = nn.Conv2d(width, 4, 1)

    def forward(self, x):
        return torch.cat([self.boxes(self.tower(level)).flatten(2) for level in self.neck(x)], 2)


class RetinaHead(nn.Module):
    """A head whose convolution is shared by the levels, while each level has its own BatchNorm."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.neck = Pyramid(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))
        self.classes = nn.Conv2d(width, 5, 1)

    def forward(self, x):
        levels = zip(self.neck(x), self.norms, strict=True)
        return torch.cat([self.classes(norm(self.conv(level)).relu()).flatten(2) for level, norm in levels], 2)


class Audio(nn.Module):
    """Dilated causal convolutions over a waveform, with residuals, and BatchNorm1d on (N, C, L)."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.stem = nn.Conv1d(1, width, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 3, dilation=2**i) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(3))
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        x = self.stem(x)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = x + norm(conv(F.pad(x, (2 * 2**i, 0)))).relu()
        return self.head(x.mean(2))


def medical() -> nn.Module:
    """Volumes."""
    return nn.Sequential(
        nn.Conv3d(1, 3, 3, padding=1), nn.BatchNorm3d(3), nn.PReLU(3), nn.MaxPool3d(2),
        nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), nn.PReLU(4), nn.Conv3d(4, 2, 1),
    )  # fmt: skip


class Tabular(nn.Module):
    """Numbers and categories by name, the numbers normalised as they come, as is usual for tables."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.numbers_bn = nn.BatchNorm1d(4)
        self.layers = nn.Sequential(
            nn.Linear(7, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3),
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(width, 1)

    def forward(self, numbers, categories):
        x = torch.cat([self.numbers_bn(numbers), self.embedding(categories)], 1)
        return self.head(self.layers(x))


def table_batch(numbers: Tensor) -> dict[str, Tensor]:
    return {"numbers": numbers, "categories": numbers[:, 0].abs().long().clamp(max=4)}


def lazy() -> nn.Module:
    """Layers that learn their sizes at the first forward, which has not been."""
    return nn.Sequential(
        nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4), nn.LazyBatchNorm1d()
    )


def materialised() -> nn.Module:
    model = lazy()
    model(torch.randn(2, 2, 8, 8))
    return model


class Discriminator(nn.Module):
    """Convolutions with parametrized weights."""

    def __init__(self):
        super().__init__()
        self.spectral = spectral_norm(nn.Conv2d(2, 4, 3))
        self.bn1 = nn.BatchNorm2d(4)
        self.weight = weight_norm(nn.Conv2d(4, 5, 3))
        self.bn2 = nn.BatchNorm2d(5)

    def forward(self, x):
        x = F.leaky_relu(self.bn1(self.spectral(x)), 0.2)
        return F.leaky_relu(self.bn2(self.weight(x)), 0.2).mean((2, 3))


class Hybrid(nn.Module):
    """A convolutional stem, self-attention over its pixels, and BatchNorm on the tokens in place of LayerNorm."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU())
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm1 = nn.BatchNorm1d(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm2 = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = self.norm1((x + self.attention(x, x, x, need_weights=False)[0]).transpose(1, 2)).transpose(1, 2)
        x = self.norm2((x + self.feed_forward(x)).transpose(1, 2)).mean(2)
        return self.head(x)


class InvertedResidual(nn.Module):
    """Expand, filter each channel by itself, project."""

    def __init__(self, width: int, expanded: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, expanded, 1, bias=False), nn.BatchNorm2d(expanded), nn.ReLU6(inplace=True),
            nn.Conv2d(expanded, expanded, 3, padding=1, groups=expanded, bias=False),
            nn.BatchNorm2d(expanded), nn.ReLU6(inplace=True),
            nn.Conv2d(expanded, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x):
        return x + self.body(x)


def mobile(momentum: float | None = 0.01) -> nn.Module:
    """As MobileNets: depthwise convolutions, activations in place, a small momentum and eps of their own."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU6(inplace=True),
        InvertedResidual(4, 8), InvertedResidual(4, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum, layer.eps = momentum, 1e-3
    return model


class FineTuned(nn.Module):
    """A backbone that is kept as it was trained: in evaluation mode whatever the model's, and without gradients."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.backbone[1].running_mean.copy_(torch.randn(4))
        self.backbone.requires_grad_(False)
        self.head = nn.Sequential(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
        self.train()

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x):
        return self.head(self.backbone(x))


class Tied(nn.Module):
    """The same block under two names and used twice, and a layer that has its weight from another."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.stem = nn.Conv2d(2, width, 1)
        self.block = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.again = self.block
        self.norm = self.block[1]
        self.last_conv = nn.Conv2d(width, width, 3)
        self.last = nn.BatchNorm2d(width)
        self.last.weight = self.norm.weight

    def forward(self, x):
        x = self.again(self.block(self.stem(x)))
        return self.last(self.last_conv(x))


class Branches(nn.Module):
    """Layers that are not always reached: one for bright batches, one while training, one never."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.bright = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.auxiliary = nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3))
        self.former_head = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        features = self.stem(x)
        if x.mean() > 0.4:
            features = features + self.bright(features)
        output = self.head(features)
        return output + 0.4 * self.auxiliary(features) if self.training else output


class Checkpointed(nn.Module):
    """Activation checkpointing: the backward pass runs a part of the forward again."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = double_convolution(2, 4), double_convolution(4, 3)

    def forward(self, x):
        return checkpoint(self.body, self.stem(x), use_reentrant=False)


def plain(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two convolutions."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.Flatten()
    ).to(dtype)


def images(**options: Any) -> Callable[[], list[Any]]:
    return lambda: tensors(2, 8, 8, **options)


TRANSPOSED = {"moving_average": ("up_bn", "needs an nn.Conv1d, Conv2d, Conv3d or Linear .* is a .*ConvTranspose2d")}
CASES: dict[str, Case] = {
    "u-net": Case(UNet, images(), refused=TRANSPOSED),
    "channels last": Case(
        lambda: UNet().to(memory_format=torch.channels_last),
        images(kind=lambda x: x.to(memory_format=torch.channels_last)),
        refused=TRANSPOSED,
    ),
    "shared head": Case(SharedHead, images()),
    "retina head": Case(
        RetinaHead, images(), refused={"moving_average": ("norms.*", "Conv2d that other operations use too")}
    ),
    "audio": Case(Audio, lambda: tensors(1, 24)),
    "medical": Case(medical, lambda: tensors(1, 4, 6, 6, kind=lambda x: (x, x[:, 0] > 0))),
    "tabular": Case(
        Tabular,
        lambda: tensors(4, kind=table_batch),
        refused={"moving_average": ("numbers_bn", "its input is the model's own")},
    ),
    "lazy": Case(materialised, images()),
    "parametrized": Case(Discriminator, images(), refused={"moving_average": ("*", "it is a .*ParametrizedConv2d")}),
    "attention": Case(Hybrid, images(), refused={"moving_average": ("norm?", "its input is the output of transpose")}),
    "mobile": Case(mobile, images()),
    "cumulative": Case(lambda: mobile(momentum=None), images()),
    "checkpointed": Case(Checkpointed, images()),
    "frozen backbone": Case(FineTuned, images(), kept={"backbone.1": "frozen"}),
    "sync": Case(
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(UNet()),
        images(),
        refused={"*": ("*", "leave convert_sync_batchnorm out")},
        twin=UNet,
    ),
    "tied": Case(Tied, images()),
    "branches": Case(
        Branches,
        images(),
        kept={"auxiliary.1": "not reached", "former_head.1": "not reached"},
        unseen=("former_head.1",),
    ),
    "traced": Case(lambda: torch.fx.symbolic_trace(UNet()), images(), refused=TRANSPOSED),
    "compiled": Case(lambda: torch.compile(plain(), backend="eager"), images()),
    "double": Case(lambda: plain(torch.float64), images(dtype=torch.float64)),
    "bfloat16": Case(lambda: plain(torch.bfloat16), images(dtype=torch.bfloat16)),
}
