"""encode_boxes and decode_boxes under autograd, torch.func, torch.compile and torch.export."""

import functools

import pytest
import torch

from retinanet_ext import decode_boxes, encode_boxes, reference

OPS = torch.ops.retinanet_ext
WEIGHTS = (10.0, 9.0, 5.0, 4.0)
FUNCTIONS = {
    "encode_boxes": functools.partial(encode_boxes, weights=WEIGHTS),
    "decode_boxes": functools.partial(decode_boxes, weights=WEIGHTS, clip=0.5),
}
REFERENCES = {
    "encode_boxes": functools.partial(reference.encode_boxes, weights=WEIGHTS),
    "decode_boxes": functools.partial(reference.decode_boxes, weights=WEIGHTS, clip=0.5),
}
RAW = {"encode_boxes": (*WEIGHTS,), "decode_boxes": (*WEIGHTS, 0.5)}
SHAPES = [((5,), (5,)), ((2, 5), (5,)), ((5,), (2, 5)), ((3, 1, 2), (4, 1)), ((), (4,)), ((1, 3), (2, 3))]
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def random_boxes(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 40
    size = 5 + torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 40
    return torch.cat([corner, corner + size], dim=-1).to(dtype)


def inputs_of(name, shapes, dtype=torch.float64, requires_grad=True):
    """Values and anchors; of deltas some are beyond the clip, none at it."""
    values = random_boxes(*shapes[0], seed=1)
    if name == "decode_boxes":
        values = torch.randn(*shapes[0], 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 4
    return [one.to(dtype).requires_grad_(requires_grad) for one in (values, random_boxes(*shapes[1], seed=3))]


@every_function
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_gradient(name, shapes):
    assert torch.autograd.gradcheck(FUNCTIONS[name], inputs_of(name, shapes))
    raw = functools.partial(_raw, name)
    assert torch.autograd.gradcheck(raw, inputs_of(name, shapes))


def _raw(name, values, anchors):
    return getattr(OPS, name)(values, anchors, *RAW[name])


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shapes", [((300,), (300,)), ((4, 300), (300,))], ids=str)
def test_gradient_is_pytorchs(name, dtype, shapes):
    inputs = inputs_of(name, shapes, dtype)
    grad = torch.randn(*shapes[0], 4).to(dtype)
    gradients = torch.autograd.grad(FUNCTIONS[name](*inputs), inputs, grad)
    wide, narrow = (
        [one.detach().to(kind).requires_grad_() for one in inputs] for kind in (torch.float64, torch.float32)
    )
    truth = torch.autograd.grad(REFERENCES[name](*wide), wide, grad.double())
    peers = torch.autograd.grad(REFERENCES[name](*narrow), narrow, grad.float())
    for gradient, right, peer in zip(gradients, truth, peers, strict=True):
        assert gradient.dtype == dtype
        # twice the float32 error of PyTorch, and of halves half a unit in the last place
        info = torch.finfo(dtype)
        rounding = info.eps / 2 * right.abs() + info.tiny * info.eps if dtype != torch.float32 else 0.0
        assert ((gradient - right).abs() <= 2 * (peer - right).abs().max() + rounding).all()


@every_function
def test_gradients_of_two_types(name):
    values, anchors = inputs_of(name, ((2, 50), (50,)))
    for dtypes in ((torch.float16, torch.float32), (torch.bfloat16, torch.float16), (torch.float32, torch.float64)):
        pair = [one.detach().to(dtype).requires_grad_() for one, dtype in zip((values, anchors), dtypes, strict=True)]
        result = FUNCTIONS[name](*pair)
        assert result.dtype == torch.promote_types(*dtypes)
        gradients = torch.autograd.grad(result.square().sum(), pair)
        exact = [one.detach().double().requires_grad_() for one in pair]
        truth = torch.autograd.grad(REFERENCES[name](*exact).square().sum(), exact)
        for gradient, right, dtype in zip(gradients, truth, dtypes, strict=True):
            assert gradient.dtype == dtype
            scale = right.abs().max()
            assert ((gradient - right).abs() <= 1e-5 * scale + torch.finfo(dtype).eps * right.abs()).all()


@every_function
def test_gradient_of_one_argument_alone(name):
    values, anchors = inputs_of(name, ((2, 5), (5,)))
    both = torch.autograd.grad(FUNCTIONS[name](values, anchors).square().sum(), (values, anchors))
    for function in (FUNCTIONS[name], functools.partial(_raw, name)):
        (first,) = torch.autograd.grad(function(values, anchors.detach()).square().sum(), (values,))
        (second,) = torch.autograd.grad(function(values.detach(), anchors).square().sum(), (anchors,))
        assert torch.equal(first, both[0])
        assert torch.equal(second, both[1])


@every_function
def test_upstream_gradients_of_any_strides(name):
    values, anchors = inputs_of(name, ((6,), (6,)))
    result = FUNCTIONS[name](values, anchors)
    grad = torch.randn(4, 6, dtype=torch.float64)
    for layout in (grad.T, torch.randn(25, dtype=torch.float64)[1:].view(6, 4), torch.ones(()).double().expand(6, 4)):
        found = torch.autograd.grad(result, (values, anchors), layout, retain_graph=True)
        right = torch.autograd.grad(result, (values, anchors), layout.contiguous().clone(), retain_graph=True)
        assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))


@every_function
def test_second_derivatives_are_refused(name):
    for function in (FUNCTIONS[name], functools.partial(_raw, name)):
        values, anchors = inputs_of(name, ((3,), (3,)))
        first = torch.autograd.grad(function(values, anchors).sum(), (values, anchors), create_graph=True)
        with pytest.raises(RuntimeError, match=f"{name}: second derivatives are not implemented"):
            (first[0].sum() + first[1].sum()).backward()


@every_function
def test_no_gradient_no_graph(name):
    values, anchors = inputs_of(name, ((3,), (3,)))
    with torch.no_grad():
        assert not FUNCTIONS[name](values, anchors).requires_grad
    assert FUNCTIONS[name](values, anchors.detach()).grad_fn is not None


FLOAT32, FLOAT64, HALVES = (torch.float32,) * 2, (torch.float64,) * 2, (torch.float16, torch.bfloat16)


@every_function
@pytest.mark.parametrize(
    ("shapes", "dtypes"),
    [*((shapes, FLOAT32) for shapes in [*SHAPES, ((0,), (1,))]), (SHAPES[0], FLOAT64), (SHAPES[-1], HALVES)],
    ids=str,
)
def test_opcheck(name, shapes, dtypes):
    pair = [one.detach().to(dtype).requires_grad_() for one, dtype in zip(inputs_of(name, shapes), dtypes, strict=True)]
    torch.library.opcheck(getattr(OPS, name).default, (*pair, *RAW[name]))
    plain = [one.detach() for one in pair]
    grad = torch.ones_like(FUNCTIONS[name](*plain))
    for wanted in ((True, True), (True, False), (False, True)):
        arguments = (grad, *plain, *RAW[name], *wanted)
        torch.library.opcheck(
            getattr(OPS, name + "_backward").default, arguments, test_utils=("test_schema", "test_faketensor")
        )


@every_function
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 1), (1, 0)], ids=str)
@pytest.mark.parametrize("shapes", [((5,), (5,)), ((2, 5), (5,)), ((), (5,))], ids=str)
def test_vmap(name, in_dims, shapes):
    """Values and gradients of each entry."""

    def stacked(index, dim):
        entries = [inputs_of(name, shapes, requires_grad=False)[index] * (1 + entry / 8) for entry in range(3)]
        return entries[0] if dim is None else torch.stack(entries, dim=min(dim, entries[0].dim()))

    in_dims = tuple(dim if dim is None else min(dim, len(shapes[i]) + 1) for i, dim in enumerate(in_dims))
    arguments = [stacked(index, dim) for index, dim in enumerate(in_dims)]
    mapped = torch.func.vmap(FUNCTIONS[name], in_dims)(*arguments)
    both = torch.func.grad(lambda *pair: FUNCTIONS[name](*pair).square().sum(), argnums=(0, 1))
    gradients = torch.func.vmap(both, in_dims)(*arguments)
    for entry in range(3):
        each = [one if dim is None else one.select(dim, entry) for one, dim in zip(arguments, in_dims, strict=True)]
        assert torch.equal(mapped[entry], FUNCTIONS[name](*each))
        for found, right in zip(gradients, both(*each), strict=True):
            torch.testing.assert_close(found[entry], right, rtol=1e-13, atol=1e-16)


@every_function
def test_gradients_of_one_argument_under_vmap(name):
    values, anchors = inputs_of(name, ((3, 2, 5), (5,)), requires_grad=False)
    for argument in (0, 1):
        one = torch.func.grad(lambda *pair: FUNCTIONS[name](*pair).square().sum(), argnums=argument)
        found = torch.func.vmap(one, (0, None))(values, anchors)
        assert all(torch.allclose(found[entry], one(values[entry], anchors), rtol=1e-13) for entry in range(3))


@every_function
def test_batched_upstream_gradients(name):
    values, anchors = inputs_of(name, ((2, 3), (3,)))
    result = FUNCTIONS[name](values, anchors)
    jacobian = torch.func.jacrev(FUNCTIONS[name], argnums=(0, 1))(values.detach(), anchors.detach())
    expected = torch.autograd.functional.jacobian(REFERENCES[name], (values, anchors))
    for found, right in zip(jacobian, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-15)
    grads = torch.randn(5, 2, 3, 4, dtype=torch.float64)
    batched = torch.autograd.grad(result, (values, anchors), grads, is_grads_batched=True, retain_graph=True)
    for entry in range(5):
        each = torch.autograd.grad(result, (values, anchors), grads[entry], retain_graph=True)
        for found, right in zip(batched, each, strict=True):
            torch.testing.assert_close(found[entry], right, rtol=1e-13, atol=1e-16)


@every_function
def test_forward_mode_is_refused_not_forgotten(name):
    values, anchors = inputs_of(name, ((3,), (3,)), requires_grad=False)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"),
    ):
        FUNCTIONS[name](torch.autograd.forward_ad.make_dual(values, values), anchors)


@every_function
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(name, dynamic):
    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def loss(values, anchors):
        return (FUNCTIONS[name](values, anchors) * 2).square().sum()

    for count in (4, 9):
        compiled, eager = inputs_of(name, ((2, count), (count,))), inputs_of(name, ((2, count), (count,)))
        loss(*compiled).backward()
        (FUNCTIONS[name](*eager) * 2).square().sum().backward()
        for one, other in zip(compiled, eager, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-14, atol=1e-17)


@every_function
def test_exports(name):
    class Module(torch.nn.Module):
        def forward(self, values, anchors):
            return FUNCTIONS[name](values, anchors)

    values, anchors = inputs_of(name, ((2, 5), (5,)), requires_grad=False)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Module(), (values, anchors), dynamic_shapes=({0: batch}, {}))
    other = inputs_of(name, ((7, 5), (5,)), requires_grad=False)[0]
    assert torch.equal(program.module()(other, anchors), FUNCTIONS[name](other, anchors))
