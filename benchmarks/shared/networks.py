"""The networks that the benchmarks attack, written small; every size can be reduced for a small machine."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


def _conv_norm(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(_conv(inputs, outputs, size, stride), nn.BatchNorm2d(outputs))


class PostActivationBlock(nn.Module):
    """Residual block, convolution before batch norm before ReLU (He et al., https://arxiv.org/abs/1512.03385).

    Args:
        inputs: channels that come in.
        width: channels of the 3x3 convolutions.
        stride: of the (first) 3x3 convolution.
        expansion: 1 for two 3x3 convolutions; more for a bottleneck 1x1, 3x3, 1x1 with `expansion * width` outputs.
    """

    def __init__(self, inputs: int, width: int, *, stride: int = 1, expansion: int = 1) -> None:
        super().__init__()
        outputs = expansion * width
        if expansion == 1:
            parts = [_conv_norm(inputs, width, 3, stride), nn.ReLU(), _conv_norm(width, width, 3)]
        else:
            parts = [_conv_norm(inputs, width, 1), nn.ReLU(), _conv_norm(width, width, 3, stride), nn.ReLU()]
            parts.append(_conv_norm(width, outputs, 1))
        self.body = nn.Sequential(*parts)
        same = stride == 1 and inputs == outputs
        self.shortcut: nn.Module = nn.Identity() if same else _conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, inputs, H, W) to (N, expansion * width, H / stride, W / stride)."""
        y: Tensor = self.body(x)
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A post-activation residual network: stem, four stages, mean over the image, linear head.

    Args:
        blocks: blocks per stage.
        width: channels of the first stage; each further stage has twice as many at half the resolution.
        expansion: see `PostActivationBlock`.
        classes: number of logits.
        imagenet_stem: 7x7 convolution of stride 2 and max pooling in front instead of one 3x3 convolution.
    """

    def __init__(
        self, blocks: tuple[int, ...], *, width: int, expansion: int, classes: int, imagenet_stem: bool
    ) -> None:
        super().__init__()
        if imagenet_stem:
            self.stem = nn.Sequential(_conv_norm(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        else:
            self.stem = nn.Sequential(_conv_norm(3, width, 3), nn.ReLU())
        stages: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(blocks):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                stages.append(PostActivationBlock(channels, width << stage, stride=stride, expansion=expansion))
                channels = expansion * (width << stage)
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] to logits (N, classes)."""
        features: Tensor = self.stages(self.stem(x))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


def resnet18(*, width: int = 64, classes: int = 10) -> ResNet:
    """ResNet-18 for CIFAR-size images (3x32x32): 3x3 stem without pooling."""
    return ResNet((2, 2, 2, 2), width=width, expansion=1, classes=classes, imagenet_stem=False)


def resnet50(*, width: int = 64, classes: int = 1000) -> ResNet:
    """ResNet-50 for ImageNet-size images (3x224x224): bottleneck blocks of expansion 4."""
    return ResNet((3, 4, 6, 3), width=width, expansion=4, classes=classes, imagenet_stem=True)


class PreActivationBlock(nn.Module):
    """Residual block with batch norm and ReLU ahead of each 3x3 convolution (https://arxiv.org/abs/1603.05027)."""

    def __init__(self, inputs: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, width, 3, stride)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.shortcut = None if inputs == width and stride == 1 else _conv(inputs, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, inputs, H, W) to (N, width, H / stride, W / stride)."""
        y = F.relu(self.norm1(x))
        passed = x if self.shortcut is None else self.shortcut(y)
        out: Tensor = passed + self.conv2(F.relu(self.norm2(self.conv1(y))))
        return out


class WideResNet(nn.Module):
    """WRN-depth-width (Zagoruyko and Komodakis, https://arxiv.org/abs/1605.07146) for 3x32x32 images.

    Args:
        depth: number of layers, 6 n + 4.
        width: widening factor; 10 gives 160, 320 and 640 channels.
        classes: number of logits.

    Raises:
        ValueError: if `depth` is not 6 n + 4.
    """

    def __init__(self, *, depth: int = 28, width: int = 10, classes: int = 10) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"expected depth 6 n + 4 with n >= 1, got {depth}; use 10, 16, 22, 28, ...")
        channels = 16
        parts: list[nn.Module] = [_conv(3, channels, 3)]
        for stage in range(3):
            for index in range((depth - 4) // 6):
                outputs = (16 << stage) * width
                parts.append(PreActivationBlock(channels, outputs, stride=2 if stage > 0 and index == 0 else 1))
                channels = outputs
        self.body = nn.Sequential(*parts, nn.BatchNorm2d(channels), nn.ReLU())
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, 32, 32) in [0, 1] to logits (N, classes)."""
        features: Tensor = self.body(x)
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


class EncoderBlock(nn.Module):
    """Pre-norm transformer block: self-attention, then a two-layer perceptron with GELU, each with a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def _attend(self, x: Tensor) -> Tensor:
        # (N, T, 3 heads d) -> (N, T, 3, heads, d) -> (3, N, heads, T, d)
        # (unbind: its backward pass stacks three gradients, where three selections fill and add up three tensors)
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.project(mixed.transpose(1, 2).flatten(2))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, T, width) to tokens of the same shape."""
        x = x + self._attend(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """Vision transformer (Dosovitskiy et al., https://arxiv.org/abs/2010.11929); the defaults are ViT-S/16.

    Args:
        image: height and width of the images, a multiple of `patch`.
        patch: height and width of a patch.
        width: size of a token.
        depth: number of blocks.
        heads: attention heads per block.
        classes: number of logits.

    Raises:
        ValueError: if `image` is not a multiple of `patch`, or `width` not of `heads`.
    """

    def __init__(
        self,
        *,
        image: int = 224,
        patch: int = 16,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        if image % patch or width % heads:
            raise ValueError(
                f"expected image a multiple of patch and width of heads, got {image=} {patch=} {width=} {heads=}"
            )
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 1 + (image // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, image, image) in [0, 1] to logits (N, classes)."""
        patches = self.embed(x).flatten(2).transpose(1, 2)
        first = self.class_token.expand(patches.shape[0], -1, -1)
        tokens: Tensor = self.blocks(torch.cat([first, patches], 1) + self.position)
        logits: Tensor = self.head(self.norm(tokens[:, 0]))
        return logits


def settle_statistics(model: nn.Module, images: Tensor, *, passes: int = 3) -> nn.Module:
    """Give the batch norms of an untrained network running statistics that fit `images`; eval mode afterwards.

    With statistics at their initial 0 and 1 the activations of a deep network grow or vanish, and a benchmark would
    time arithmetic on denormals or infinities.
    """
    model.train()
    with torch.no_grad():
        for _ in range(passes):
            model(images)
    return model.eval()
