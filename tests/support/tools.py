"""Small models, reference gradients and comparisons that the tests share."""

import copy
import hashlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode


class Block(nn.Module):
    """A post-activation residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def small_net(seed: int = 0) -> nn.Sequential:
    """A residual network for (N, 3, 8, 8) with ten classes and batch statistics that are not those of a new one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, 1, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            Block(8, 8),
            Block(8, 16, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 10),
        )
        settle(net)
    return net


def head_of(net: nn.Sequential) -> nn.Linear:
    """The last layer of :func:`small_net`."""
    head = net[-1]
    assert isinstance(head, nn.Linear)
    return head


def between_the_ends(tensor: Tensor) -> Tensor:
    """All values but the first and the last, in which writes past PyTorch cannot be noticed on a processor either."""
    return tensor.data.view(-1)[1:-1]


def steep() -> nn.Sequential:
    """Overflows in float16 until the scale has been lowered."""
    net = small_net()
    with torch.no_grad():
        head_of(net).weight.mul_(5e4 / head_of(net).weight.abs().max())
    return net


def attackable_net() -> nn.Sequential:
    """:func:`small_net` with classes that images of :func:`batch` do spread over, so that attacks have work to do."""
    net = small_net().eval()
    first, head = net[0], head_of(net)
    assert isinstance(first, nn.Conv2d)
    with torch.no_grad():
        first.weight.mul_(10)  # images of noise differ little: else logits are differences of large numbers
        logits = net(batch(200, seed=9)[0])
        factor = 3 / logits.std(0, keepdim=True).T
        head.weight.mul_(factor)
        head.bias.copy_((head.bias - logits.mean(0)) * factor.flatten())
    return net


def settle(net: nn.Module) -> nn.Module:
    """Give batch norms the statistics and weights of a trained network."""
    for part in net.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
            part.running_mean.normal_(0, 0.3)
            part.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            if part.affine:
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, 0, 0.3)
    return net


def batch(samples: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Images for :func:`small_net`, and labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(samples, 3, 8, 8, generator=generator), torch.randint(10, (samples,), generator=generator)


def reference(net: nn.Module) -> nn.Module:
    """An independent float64 copy in eval mode."""
    return copy.deepcopy(net).eval().double()


Loss = Callable[[Tensor, Tensor], Tensor]


def input_gradient(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, loss: Loss = F.cross_entropy) -> Tensor:
    """The gradient of a loss with respect to the input."""
    x = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(model(x), y), x)
    return gradient


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine per sample, in float64 and free of underflow."""
    a, b = (t.detach().double().flatten(1) for t in (a, b))
    a, b = (t / t.abs().amax(1, keepdim=True).clamp(min=1e-300) for t in (a, b))
    return F.cosine_similarity(a, b)


def fingerprint(model: nn.Module) -> list[Any]:
    """All that an attack might change in a model: tensors, gradients, flags, hooks, attributes."""
    return [_of_module(name, part) for name, part in model.named_modules()]


def _of_module(name: str, part: nn.Module) -> tuple[Any, ...]:
    parameters = [(key, _of_tensor(p), p is not None and p.requires_grad) for key, p in part._parameters.items()]
    gradients = [
        (key, p is not None and p.grad is not None and _of_tensor(p.grad)) for key, p in part._parameters.items()
    ]
    buffers = [(key, _of_tensor(b)) for key, b in part._buffers.items()]
    hooks = [(key, list(value)) for key, value in vars(part).items() if key.endswith("_hooks")]
    plain = {key: value for key, value in vars(part).items() if isinstance(value, (int, float, str, bool, type(None)))}
    others = {key: id(value) for key, value in vars(part).items() if key not in plain}
    return name, type(part).__name__, parameters, gradients, buffers, hooks, plain, others


def _of_tensor(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor
    return tensor.data_ptr(), tensor.dtype, hashlib.sha1(data.numpy().tobytes()).hexdigest()


class CountOperators(TorchDispatchMode):
    """Counts the operators that are called inside, by name.

    Attributes:
        calls: name -> number of calls.
        dtypes: name -> for each call the dtypes of the tensors among its arguments, and that of its output.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.dtypes: dict[str, list[tuple[torch.dtype, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        output = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, output) if isinstance(t, Tensor)]
        self.dtypes.setdefault(name, []).append(tuple(t.dtype for t in tensors))
        return output
