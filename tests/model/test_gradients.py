"""Gradients of several outputs are those of ``torch.autograd.grad``."""

import torch

from fastadv_adapters.modules import filled_gradients_of, gradients_of


def test_gradients_are_those_of_autograd_and_none_where_no_output_depends() -> None:
    x, unused = torch.rand(4, 3, requires_grad=True), torch.rand(2, requires_grad=True)
    outputs, grads = [x.exp(), x.sum(1)], [torch.rand(4, 3), torch.rand(4)]
    (expected,) = torch.autograd.grad(outputs, [x], grads, retain_graph=True)
    found, none = gradients_of(outputs, [x, unused], grads, retain_graph=True)
    assert found is not None
    torch.testing.assert_close(found, expected)
    assert none is None
    filled, zeros = filled_gradients_of(outputs, [x, unused], grads)
    torch.testing.assert_close(filled, expected)
    torch.testing.assert_close(zeros, torch.zeros(2))
