"""Loss and gradient in one pass: taken where nobody can see the difference, and the same bits where it is."""

from __future__ import annotations

import gc
import weakref
from contextlib import ExitStack

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import retinanet_ext
from retinanet_ext.ops import one_pass

OPERATORS = ["sigmoid", "multilevel"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Case:
    """One operator with logits that require a gradient, and what its plain path makes of them."""

    def __init__(self, operator: str, dtype: torch.dtype = torch.float32):
        self.operator = operator
        if operator == "sigmoid":
            self.leaves = [(torch.randn(37, 6) * 3).to(dtype)]
            self.targets = torch.randint(-2, 7, (37,))
        else:
            self.leaves = [
                (torch.randn(2, 12, 3, 4) * 3).to(dtype).contiguous(memory_format=torch.channels_last),
                (torch.randn(2, 12, 2, 1) * 3).to(dtype),
            ]
            self.targets = torch.randint(-2, 7, (2, 28))
            self.normalizer = torch.tensor([3.0, 5.0])
        for leaf in self.leaves:
            leaf.requires_grad_()

    def loss(self, *leaves: torch.Tensor) -> torch.Tensor:
        leaves = leaves or self.leaves
        if self.operator == "sigmoid":
            return retinanet_ext.sigmoid_focal_loss(*leaves, self.targets, reduction="mean")
        return retinanet_ext.multilevel_focal_loss(list(leaves), self.targets, normalizer=self.normalizer)

    def plain(self, upstream: float = 1.0) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Loss and gradients by the functional operators."""
        ops = torch.ops.retinanet_ext
        logits = [leaf.detach() for leaf in self.leaves]
        grad = torch.tensor(upstream)
        if self.operator == "sigmoid":
            arguments = (logits[0], self.targets, None, None, 0.25, 2.0, 0.0, -2, 1)
            return ops.sigmoid_focal_loss(*arguments, False), [ops.sigmoid_focal_loss_backward(grad, *arguments)]
        arguments = (logits, self.targets, self.normalizer, 6, 0.25, 2.0, 1.0)
        return ops.multilevel_focal_loss(*arguments), ops.multilevel_focal_loss_backward(grad, *arguments)

    def assert_gradients(self, gradients, upstream: float = 1.0) -> None:
        for gradient, expected in zip(gradients, self.plain(upstream)[1], strict=True):
            assert gradient.stride() == expected.stride()
            assert torch.equal(gradient, expected)


def kept_gradients(loss: torch.Tensor) -> list[torch.Tensor] | None:
    """What the graph of `loss` holds ready; None where that is nothing."""
    node = loss.grad_fn
    kept = getattr(node, "grad_inputs", getattr(node, "grad_logits", None))
    return kept if kept is None or isinstance(kept, list) else [kept]


@pytest.fixture(autouse=True)
def fresh_flags():
    one_pass._flags.clear()
    yield
    one_pass._flags.clear()


@pytest.fixture(params=OPERATORS)
def case(request) -> Case:
    return Case(request.param)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_plain_training_takes_one_pass_with_the_bits_of_two(operator, dtype):
    case = Case(operator, dtype)
    loss = case.loss()
    case.assert_gradients(kept_gradients(loss))
    assert torch.equal(loss, case.plain()[0])
    case.assert_gradients(torch.autograd.grad(loss, case.leaves))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("upstream", [0.1, -3.0, 0.0, 65536.0])
def test_any_upstream_gradient_has_the_bits_of_two_passes(operator, dtype, upstream):
    case = Case(operator, dtype)
    loss = case.loss()
    assert kept_gradients(loss) is not None
    case.assert_gradients(torch.autograd.grad(loss, case.leaves, torch.tensor(upstream)), upstream)


def test_a_scaled_loss_is_remembered_and_a_plain_one_again(case):
    (case.loss() / 7).backward()
    loss = case.loss()
    assert kept_gradients(loss) is None  # one pass would be wasted on the next scaled loss
    case.assert_gradients(torch.autograd.grad(loss, case.leaves))
    assert kept_gradients(case.loss()) is not None


def test_a_second_backward_pass_over_a_retained_graph(case):
    loss = case.loss()
    first = torch.autograd.grad(loss, case.leaves, retain_graph=True)
    for gradient in first:
        gradient.fill_(7)  # it is the caller's own
    case.assert_gradients(torch.autograd.grad(loss, case.leaves, torch.tensor(2.0), retain_graph=True), 2.0)
    case.assert_gradients(torch.autograd.grad(loss, case.leaves))


def test_gradients_accumulate(case):
    loss = case.loss()
    loss.backward(retain_graph=True)
    loss.backward()
    case.assert_gradients([leaf.grad / 2 for leaf in case.leaves])
    case.loss().backward()
    expected = [3 * gradient for gradient in case.plain()[1]]
    for leaf, gradient in zip(case.leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def test_a_freed_graph_cannot_be_used_again(case):
    loss = case.loss()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_logits_changed_in_between_are_noticed(case):
    logits = [leaf * 1 for leaf in case.leaves]
    loss = case.loss(*logits)
    logits[0].detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_create_graph_gives_right_gradients_and_a_clear_error_behind_them(case):
    gradients = torch.autograd.grad(case.loss(), case.leaves, create_graph=True)
    case.assert_gradients([gradient.detach() for gradient in gradients])
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        gradients[0].square().sum().backward()


def test_batched_upstream_gradients(case):
    upstream = torch.tensor([1.0, 2.0, -0.5])
    batched = torch.autograd.grad(case.loss(), case.leaves, upstream, is_grads_batched=True)
    for i, value in enumerate(upstream.tolist()):
        for gradient, expected in zip(batched, case.plain(value)[1], strict=True):
            torch.testing.assert_close(gradient[i], expected, rtol=1e-6, atol=0)


def test_one_of_two_losses(case):
    """The upstream gradient of an unused part is 0, or the part is not run at all."""
    loss = case.loss()
    other = case.leaves[0].float().square().sum()
    gradients = torch.autograd.grad(other + 0 * loss, case.leaves, allow_unused=True)
    torch.testing.assert_close(gradients[0], 2 * case.leaves[0].detach())


def test_the_memory_goes_with_the_graph(case):
    loss = case.loss()
    kept = [weakref.ref(gradient) for gradient in kept_gradients(loss)]
    loss.backward()
    assert kept_gradients(loss) is None
    del loss
    unused = case.loss()
    kept += [weakref.ref(gradient) for gradient in kept_gradients(unused)]
    del unused
    for leaf in case.leaves:
        leaf.grad = None
    gc.collect()
    assert not any(reference() for reference in kept)


class Marked(torch.Tensor):
    """A tensor subclass that does nothing."""


def test_dtypes_and_reductions_that_keep_two_passes():
    for operator in OPERATORS:
        for dtype in (torch.float16, torch.float64):
            assert kept_gradients(Case(operator, dtype).loss()) is None
    logits = torch.randn(5, 3, requires_grad=True)
    loss = retinanet_ext.sigmoid_focal_loss(logits, torch.zeros(5, dtype=torch.int64))
    assert kept_gradients(loss) is None
    with torch.no_grad():
        assert Case("multilevel").loss().grad_fn is None
    case = Case("sigmoid")
    assert case.loss(case.leaves[0].detach()).grad_fn is None


@pytest.mark.parametrize("gamma", [0.5, 1.7, 2.0])
def test_soft_targets_keep_two_passes(gamma):
    """Their loss would be rounded otherwise where the gradient is computed with it."""
    for size in (6, 37):
        logits = (torch.randn(size, 1) * 6).requires_grad_()
        targets = torch.rand(size, 1)
        losses = []
        for _ in range(3):
            loss = retinanet_ext.sigmoid_focal_loss(logits, targets, gamma=gamma, reduction="sum")
            assert kept_gradients(loss) is None
            (loss / 2).backward()
            losses.append(loss.detach())
        assert torch.equal(losses[0], losses[1])
        assert torch.equal(losses[0], losses[2])


def test_a_default_device_is_not_followed(case):
    with torch.device("meta"):
        loss = case.loss()
    assert kept_gradients(loss) is not None
    case.assert_gradients(torch.autograd.grad(loss, case.leaves))


def test_pre_dispatch_tracing_keeps_two_passes(case):
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(lambda *leaves: case.loss(*leaves), pre_dispatch=True)(*case.leaves)
    assert torch.equal(traced(*case.leaves), case.plain()[0])


def test_batched_upstream_gradients_of_float16_levels():
    case = Case("multilevel", torch.float16)
    for leaf in case.leaves:
        leaf.data.fill_(-8)
    case.targets.fill_(-1)
    upstream = torch.tensor([65536.0, 1.0])
    batched = torch.autograd.grad(case.loss(), case.leaves, upstream, is_grads_batched=True)
    for i, value in enumerate(upstream.tolist()):
        for gradient, expected in zip(batched, case.plain(value)[1], strict=True):
            torch.testing.assert_close(gradient[i], expected, rtol=2**-10, atol=2.0**-24)


@pytest.mark.parametrize("shape", [(4, 6, 7, 9), (4, 6, 0, 1), (4, 6, 3, 0)], ids=str)
def test_empty_levels_in_odd_strides(shape):
    """Whatever torch says of their memory format, forward, backward and fake kernel agree."""
    whole = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    for level in (whole[::2][:0], whole[:, ::2], whole[:, :2]):
        leaf = level.detach().requires_grad_()
        anchors = level.shape[2] * level.shape[3] * level.shape[1]
        targets = torch.zeros(level.shape[0], anchors, dtype=torch.int64)
        for _ in range(2):
            (retinanet_ext.multilevel_focal_loss([leaf], targets) / 2).backward()
        assert leaf.grad.shape == leaf.shape


def test_tensor_subclasses_keep_two_passes(case):
    marked = [leaf.detach().as_subclass(Marked).requires_grad_() for leaf in case.leaves]
    loss = case.loss(*marked)
    assert kept_gradients(loss) is None
    case.assert_gradients([g.as_subclass(torch.Tensor) for g in torch.autograd.grad(loss, marked)])


def test_hooks_on_saved_tensors_keep_two_passes(case):
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = case.loss()
    assert kept_gradients(loss) is None
    assert packed
    case.assert_gradients(torch.autograd.grad(loss, case.leaves))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(case, use_reentrant):
    loss = checkpoint(lambda *leaves: case.loss(*leaves), *case.leaves, use_reentrant=use_reentrant)
    assert kept_gradients(loss) is None
    assert torch.equal(loss, case.plain()[0])
    case.assert_gradients(torch.autograd.grad(loss, case.leaves) if not use_reentrant else backward(loss, case.leaves))


def backward(loss, leaves):
    loss.backward()
    return [leaf.grad for leaf in leaves]


def test_function_transforms(case):
    arguments = tuple(range(len(case.leaves)))
    case.assert_gradients(torch.func.grad(case.loss, argnums=arguments)(*(leaf.detach() for leaf in case.leaves)))
    gradients, loss = torch.func.grad_and_value(case.loss, argnums=arguments)(*case.leaves)
    case.assert_gradients(gradient.detach() for gradient in gradients)
    assert torch.equal(loss.detach(), case.plain()[0])
    stacked = [torch.stack([leaf.detach(), leaf.detach() / 2]) for leaf in case.leaves]
    losses = torch.func.vmap(case.loss)(*stacked)
    for i in range(2):
        expected = case.loss(*(leaf[i] for leaf in stacked))
        torch.testing.assert_close(losses[i], expected, rtol=1e-6, atol=0)
    gradients = torch.func.vmap(torch.func.grad(case.loss, argnums=arguments))(*stacked)
    for gradient, expected in zip(gradients, case.plain()[1], strict=True):
        torch.testing.assert_close(gradient[0], expected, rtol=1e-6, atol=0)


def test_vmap_over_leaves_that_require_a_gradient(case):
    stacked = [torch.stack([leaf.detach()] * 2).requires_grad_() for leaf in case.leaves]
    torch.func.vmap(case.loss)(*stacked).sum().backward()
    for leaf, expected in zip(stacked, case.plain()[1], strict=True):
        torch.testing.assert_close(leaf.grad[1], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_compiled(operator, dtype):
    case = Case(operator, dtype)
    torch.compiler.reset()
    compiled = torch.compile(lambda *leaves: case.loss(*leaves) * 2, fullgraph=True, backend="aot_eager")
    loss = compiled(*case.leaves)
    assert torch.equal(loss.detach(), 2 * case.plain()[0])
    case.assert_gradients(torch.autograd.grad(loss, case.leaves), 2.0)


def test_fake_tensors(case):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode, ExitStack():
        leaves = [mode.from_tensor(leaf) for leaf in case.leaves]
        case.targets = mode.from_tensor(case.targets)
        if case.operator == "multilevel":
            case.normalizer = mode.from_tensor(case.normalizer)
        loss = case.loss(*leaves)
        assert kept_gradients(loss) is None
        for gradient, leaf in zip(torch.autograd.grad(loss, leaves), leaves, strict=True):
            assert gradient.shape == leaf.shape


@pytest.mark.parametrize("operator", OPERATORS)
def test_float16_under_a_loss_scale(operator):
    """A stored float16 gradient would be 0 below 6e-8; recomputed with the scale, small gradients keep their digits."""
    case = Case(operator, torch.float16)
    for leaf in case.leaves:
        leaf.data.fill_(-8)
    case.targets.fill_(-1)
    scale = 65536.0
    gradients = torch.autograd.grad(case.loss() * scale, case.leaves)
    doubles = [leaf.detach().double().requires_grad_() for leaf in case.leaves]
    expected = torch.autograd.grad(case.loss(*doubles), doubles)
    for gradient, truth in zip(gradients, expected, strict=True):
        assert (truth < 6e-8).all()
        torch.testing.assert_close(gradient.double(), truth * scale, rtol=2**-11 + 2e-5, atol=2.0**-25)


def test_raw_operators_pass_opcheck(case):
    ops = torch.ops.retinanet_ext
    logits = [leaf.detach() for leaf in case.leaves]
    note, grad = torch.ones(1, dtype=torch.int32), torch.tensor(2.0)
    if case.operator == "sigmoid":
        arguments = (logits[0], case.targets, None, None, 0.25, 2.0, 0.0, -2, 1)
        torch.library.opcheck(ops.sigmoid_focal_loss_with_grad.default, arguments)
        refresh = (torch.empty_like(logits[0]), note, grad, *arguments, True)
        torch.library.opcheck(ops.sigmoid_focal_loss_refresh_grad.default, refresh)
    else:
        arguments = (logits, case.targets, case.normalizer, 6, 0.25, 2.0, 1.0)
        torch.library.opcheck(ops.multilevel_focal_loss_with_grad.default, arguments)
        torch.library.opcheck(ops.multilevel_focal_loss_backward.default, (grad, *arguments))
        torch.library.opcheck(ops.multilevel_focal_loss.default, (case.leaves, *arguments[1:]))
        refresh = ([torch.empty_like(level) for level in logits], note, grad, *arguments, True)
        torch.library.opcheck(ops.multilevel_focal_loss_refresh_grad.default, refresh)


def test_raw_operators_refuse_what_does_not_fit(case):
    ops = torch.ops.retinanet_ext
    logits = [leaf.detach() for leaf in case.leaves]
    note, grad = torch.ones(1, dtype=torch.int32), torch.tensor(2.0)
    if case.operator == "sigmoid":
        none = (logits[0], case.targets, None, None, 0.25, 2.0, 0.0, -2, 0)
        with pytest.raises(RuntimeError, match=r"reduction must be 1 \(mean\) or 2 \(sum\)"):
            ops.sigmoid_focal_loss_with_grad(*none)
        with pytest.raises(RuntimeError, match="targets must be class indices, and are float32"):
            ops.sigmoid_focal_loss_with_grad(logits[0], torch.rand(37, 6), *none[2:-1], 1)
        arguments = (*none[:-1], 1)
        refresh = ops.sigmoid_focal_loss_refresh_grad
        wrong = torch.empty(6, 37).t()
        right = torch.empty_like(logits[0])
        message = "grad_inputs must be contiguous"
    else:
        arguments = (logits, case.targets, case.normalizer, 6, 0.25, 2.0, 1.0)
        refresh = ops.multilevel_focal_loss_refresh_grad
        right = [torch.empty_like(level) for level in logits]
        wrong = [level.contiguous() for level in right]
        message = "each of grad_logits must be laid out as its level"
    with pytest.raises(RuntimeError, match=message):
        refresh(wrong, note, grad, *arguments, False)
    with pytest.raises(RuntimeError, match="was_one must be one int32 in host memory"):
        refresh(right, note.long(), grad, *arguments, False)
