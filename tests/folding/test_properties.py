"""Properties over random small networks: folding and updates.

`--hypothesis-profile=thorough` (or `HYPOTHESIS_PROFILE=thorough` in the environment) tries many more examples, and
other ones at every run.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastadv_adapters import FastAttackModel
from fastadv_adapters.boundary import START
from tests.support.property_tools import FLOAT64, assert_rows_close, in_dtype, run, transposed_in_3d_is_right, untouched
from tests.support.strategies import Recipe, recipes


def must_be_folded(recipe: Recipe) -> dict[str, str]:
    """Norms that nothing keeps from being folded, with what the report says of them."""
    pairs = {f"stages.{i}.norm": f"stages.{i}.layer" for i, stage in enumerate(recipe.stages) if stage.must_fold}
    for i, stage in enumerate(recipe.stages):
        if stage.shortcut == "projection":
            pairs[f"stages.{i}.projection.1"] = f"stages.{i}.projection.0"
    if recipe.hidden:
        pairs["hidden.1"] = "hidden.0"
    return {norm: f"folded into {layer}" for norm, layer in pairs.items()}


@given(
    recipe=recipes(), samples=st.integers(1, 4), channels_last=st.sampled_from(["auto", False]), training=st.booleans()
)
def test_folding_and_freezing_equal_the_plain_float64_model(
    recipe: Recipe, samples: int, channels_last: Any, training: bool
) -> None:
    net, x = recipe.build().double(), recipe.inputs(samples)
    wanted = run(net, x)
    fast = FastAttackModel(net.train(training), channels_last=channels_last, **FLOAT64)
    with untouched(net):
        found = run(fast, x)
        with torch.no_grad():
            assert torch.equal(fast(x), copy.deepcopy(net).eval()(x))
    assert_rows_close(found[0], wanted[0])
    assert_rows_close(found[1], wanted[1])
    report = fast._networks.folded.report
    assert all(what.startswith(("folded into", "frozen")) for what in report.values()), fast.summary()
    if recipe.family != "tokens":  # there batch norm's channels are the tokens, not the outputs of the layer
        assert report.items() >= must_be_folded(recipe).items(), fast.summary()


# --- updates ----------------------------------------------------------------------------------------------------------


def multiplied(net: nn.Module, x: Tensor, number: int) -> None:
    """One tensor in place."""
    tensors = [t for t in (*net.parameters(), *net.buffers()) if t.is_floating_point()]
    with torch.no_grad():
        tensors[number % len(tensors)].mul_(1.25)


def stepped(net: nn.Module, x: Tensor, number: int) -> None:
    """A step of an optimizer that moves no version counter."""
    for parameter in net.parameters():
        parameter.grad = parameter.detach() + 0.1
    torch.optim.SGD(net.parameters(), lr=0.05, fused=True).step()
    net.zero_grad()


def trained(net: nn.Module, x: Tensor, number: int) -> None:
    """Running statistics, by a forward pass in training mode."""
    net.train()
    net(torch.cat([x, x.flip(0) + 1]))
    net.eval()


def loaded(net: nn.Module, x: Tensor, number: int) -> None:
    """A checkpoint."""
    net.load_state_dict({key: value * 1.5 if value.ndim else value for key, value in net.state_dict().items()})


def exchanged(net: nn.Module, x: Tensor, number: int) -> None:
    """Another parameter in the place of one."""
    names = [name for name, _ in net.named_parameters()]
    owner, _, name = names[number % len(names)].rpartition(".")
    old = net.get_parameter(f"{owner}.{name}")
    setattr(net.get_submodule(owner), name, nn.Parameter(old.detach() * 0.75))


def written(net: nn.Module, x: Tensor, number: int) -> None:
    """What cannot be noticed."""
    parameters = list(net.parameters())
    parameters[number % len(parameters)].data.mul_(1.5)


CHANGES = {change.__name__: change for change in (multiplied, stepped, trained, loaded, exchanged, written)}


@dataclass
class Answers:
    """What a fast model computes, and what it computes that with.

    Attributes:
        logits: exact and fast.
        gradient: of the inputs.
        exponent: of the scale that the gradient was computed with; None if that was one at which samples overflowed.
        read: all tensors that the fast network reads.
    """

    logits: list[Tensor]
    gradient: Tensor
    exponent: int | None
    read: list[Tensor]


def answers(fast: FastAttackModel, x: Tensor) -> Answers:
    fast.reset_gradient_stats()
    logits, gradient = run(fast, x)  # first, for the self-check may build the network anew, which rounds otherwise
    with torch.no_grad():
        exact = fast(x)
    overflowed = fast.dtype == torch.float16 and fast.gradient_stats.nonfinite > 0
    exponent = None if overflowed else int(fast._networks.state.exponent)
    read: list[Tensor] = []
    for part in fast._networks.folded.network.modules():
        read += vars(part).get("scale_and_shift", {}).values()
        if not isinstance(part, nn.modules.batchnorm._BatchNorm):
            read += [*part.parameters(recurse=False), *part.buffers(recurse=False)]
    return Answers([exact, logits], gradient, exponent, read)


def assert_same(found: Answers, wanted: Answers) -> None:
    """Bit for bit, but for gradients at two scales.

    In float16 an update keeps the scale, while a new fast model finds its own. Where the scale kept is too large for
    the new weights, samples overflow once and it is lowered; at two scales that are not, the smallest entries of what
    lies between are rounded differently.
    """
    assert len(found.read) == len(wanted.read)
    assert all(map(torch.equal, found.logits + found.read, wanted.logits + wanted.read))
    if found.exponent is not None and found.exponent == wanted.exponent:
        assert torch.equal(found.gradient, wanted.gradient)


@given(
    recipe=recipes(most=2),
    changes=st.lists(st.tuples(st.sampled_from(list(CHANGES)), st.integers(0, 20)), max_size=3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    by_itself=st.booleans(),
)
def test_an_update_is_idempotent_and_equals_a_new_fast_model(
    recipe: Recipe, changes: list[tuple[str, int]], dtype: torch.dtype, by_itself: bool
) -> None:
    if dtype == torch.bfloat16 and recipe.family == "3d":
        assume(transposed_in_3d_is_right() or not any(stage.transposed for stage in recipe.stages))
    net, x = in_dtype(recipe, 3, dtype)
    fast = FastAttackModel(net, dtype=dtype, engine="eager")
    before = answers(fast, x)
    addresses = [t.data_ptr() for t in before.read]
    for change, number in changes:
        CHANGES[change](net, x, number)
    by_itself = by_itself and "written" not in dict(changes)
    with untouched(net):
        once = answers(fast if by_itself else fast.update(), x)
        twice = answers(fast.update(), x)
        anew = answers(FastAttackModel(net, dtype=dtype, engine="eager"), x)
    if fast.dtype != torch.float16:
        assert before.exponent == once.exponent == twice.exponent == anew.exponent == START
    assert_same(once, twice)
    assert_same(once, anew)
    assert_same(twice, anew)
    if not changes:
        assert_same(once, before)
    assert [t.data_ptr() for t in twice.read] == addresses, "an update must not move what a recorded graph would read"
