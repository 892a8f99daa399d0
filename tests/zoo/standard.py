"""Architectures as people build them: layer kinds, norm kinds, residual networks, attention."""

import torch
from torch import Tensor, nn

from benchmarks.shared.networks import VisionTransformer, WideResNet, resnet18, resnet50
from tests.zoo.registry import CLASSES, Headed, classifier, register


@register((3, 3, 16, 16))
def post_activation_resnet() -> nn.Module:
    """Two 3x3 convolutions a block."""
    return resnet18(width=4, classes=CLASSES)


@register((3, 3, 32, 32))
def bottleneck_resnet() -> nn.Module:
    """With the ImageNet stem."""
    return resnet50(width=2, classes=CLASSES)


@register((3, 3, 16, 16))
def pre_activation_resnet() -> nn.Module:
    """Most batch norms have no convolution right in front."""
    return WideResNet(depth=10, width=1, classes=CLASSES)


@register((3, 3, 16, 16))
def vision_transformer() -> nn.Module:
    """Attention written out, parameters of the model itself."""
    return VisionTransformer(image=16, patch=8, width=12, depth=2, heads=3, classes=CLASSES)


@register()
def depthwise() -> nn.Module:
    """Depthwise and pointwise, ReLU6 in place."""
    return classifier(
        nn.Conv2d(3, 6, 3, padding=1, groups=3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU6(inplace=True),
        nn.Conv2d(6, 8, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.Hardswish(),
        channels=8,
    )


@register((4, 4, 8, 8))
def grouped() -> nn.Module:
    """Two groups, with bias."""
    return classifier(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU(), channels=6)


@register()
def transposed() -> nn.Module:
    """The output channels are the weight's second dimension."""
    return classifier(nn.ConvTranspose2d(3, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(), channels=6)


@register((4, 4, 8, 8))
def transposed_grouped() -> nn.Module:
    """Each group has its own part of the output channels."""
    return classifier(
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        channels=6,
    )


@register((4, 3, 20))
def one_dimensional() -> nn.Module:
    """Sequences, transposed and grouped too."""
    return classifier(
        nn.Conv1d(3, 6, 5, stride=2),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.ConvTranspose1d(6, 4, 3, groups=2),
        nn.BatchNorm1d(4),
        nn.Tanh(),
        channels=4,
    )


@register((3, 2, 6, 6, 6))
def three_dimensional() -> nn.Module:
    """Volumes, transposed too."""
    return classifier(
        nn.Conv3d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm3d(4),
        nn.ReLU(),
        nn.ConvTranspose3d(4, 3, 2),
        nn.BatchNorm3d(3),
        nn.ELU(),
        channels=3,
    )


@register((4, 7))
def linear_batch_norm() -> nn.Module:
    """A perceptron."""
    return nn.Sequential(
        nn.Linear(7, 12),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Linear(12, 9, bias=False),
        nn.BatchNorm1d(9),
        nn.Linear(9, 5),
    )


@register((4, 5, 6))
def linear_on_sequences() -> nn.Module:
    """The norm's channels are the steps of the sequence, though as many as the layer's features: must not fold."""
    return classifier(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.GELU(), channels=5)


@register()
def group_norm() -> nn.Module:
    """Group norm behind one convolution, batch norm behind the next."""
    return classifier(
        nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6), nn.SiLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), channels=6
    )


@register(folds=False)  # PyTorch computes instance norm with the operator of batch norm
def instance_norm() -> nn.Module:
    """With running statistics and without."""
    return classifier(
        nn.Conv2d(3, 6, 3),
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
        nn.InstanceNorm2d(6),
        nn.ReLU(),
        # Another kernel size: instance norm without statistics makes the mean over space a constant.
        nn.Conv2d(6, 6, 2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        channels=6,
    )


@register(warns=True)
def data_parallel() -> nn.Module:
    """As trained on several GPUs, the other way."""
    return nn.DataParallel(classifier(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), channels=6))


@register((4, 6, 8))
class MultiheadAttention(Headed):
    """`nn.MultiheadAttention` between layer norms."""

    def __init__(self) -> None:
        super().__init__(8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, T, 8) to logits."""
        y = self.norm(x)
        mixed, _ = self.attention(y, y, y, need_weights=False)
        return self.classify(self.last(x + mixed).transpose(1, 2))


@register((4, 6, 8))
class TransformerEncoder(Headed):
    """PyTorch's own encoder layer, which takes another path in eval mode without gradients."""

    def __init__(self) -> None:
        super().__init__(8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, T, 8) to logits."""
        return self.classify(self.encoder(x).transpose(1, 2))


@register((4, 6, 3))
class Recurrent(Headed):
    """A GRU, whose weights some devices keep in one block."""

    def __init__(self) -> None:
        super().__init__(8)
        self.rnn = nn.GRU(3, 8, batch_first=True)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences (N, T, 3) to logits."""
        steps, _ = self.rnn(x)
        return self.classify(self.norm(steps.transpose(1, 2)))


@register()
def convolution_options() -> nn.Module:
    """Dilation, stride, circular and reflecting borders, with and without bias."""
    return classifier(
        nn.Conv2d(3, 6, 3, dilation=2, padding=2, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular"),
        nn.BatchNorm2d(6, eps=1e-2, momentum=None),
        nn.ReLU(),
        nn.Conv2d(6, 6, (3, 1), stride=(2, 1), padding=(1, 0), padding_mode="reflect", bias=False),
        nn.BatchNorm2d(6),
        nn.Softplus(),
        nn.Conv2d(6, 6, 3, padding="same"),
        nn.BatchNorm2d(6),
        channels=6,
    )


@register()
def norm_without_affine() -> nn.Module:
    """No weight and no bias to fold, and one behind a convolution without a bias."""
    return classifier(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6, affine=False),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
        nn.BatchNorm2d(6, affine=False),
        nn.ReLU(),
        channels=6,
    )


@register()
def synchronised_norm() -> nn.Module:
    """As trained on several GPUs."""
    return classifier(nn.Conv2d(3, 6, 3), nn.SyncBatchNorm(6), nn.ReLU(), channels=6)


@register()
def norm_first() -> nn.Module:
    """Batch norm on the images, and behind an activation."""
    return classifier(
        nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3), nn.ReLU(), channels=6
    )


@register()
def dropout_between() -> nn.Module:
    """Layers between convolution and norm that do nothing in eval mode."""
    return classifier(
        nn.Conv2d(3, 6, 3),
        nn.Dropout(0.5),
        nn.Identity(),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, bias=False),
        nn.Dropout2d(0.5),
        nn.BatchNorm2d(6),
        nn.Dropout(0.5, inplace=True),
        channels=6,
    )


@register()
class Normalised(Headed):
    """Normalises its images with buffers, one of which is not in the state dict."""

    mean: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([3.0, 4.0, 5.0]).view(1, 3, 1, 1), persistent=False)
        self.layers = nn.ModuleDict({"conv": nn.Conv2d(3, 6, 3), "norm": nn.BatchNorm2d(6), "act": nn.ReLU()})

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        x = (x - self.mean) * self.scale
        for layer in self.layers.values():
            x = layer(x)
        return self.classify(x)
