"""Every operator under what PyTorch wraps around functions: vmap where it is refused, autocast, checkpointing,
torch.func and torch.compile. What is particular to an operator is tested beside it."""

import pytest
import torch
from operator_calls import OPERATORS, operator_calls
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

REFUSE_VMAP = (
    "match_anchors",
    "assign_targets",
    "box_regression_loss",
    "nms",
    "batched_nms",
    "batched_nms_padded",
    "detect",
)
DIFFERENTIABLE = (
    "sigmoid_focal_loss",
    "multilevel_focal_loss",
    "box_iou",
    "encode_boxes",
    "decode_boxes",
    "box_regression_loss",
)


@pytest.fixture(scope="module")
def calls():
    return operator_calls()


def assert_same_bits(results, expected):
    for mine, right in zip(results, expected, strict=True):
        assert mine.dtype == right.dtype
        assert torch.equal(mine, right)


@pytest.mark.parametrize("name", REFUSE_VMAP)
def test_vmap_over_any_argument_is_refused_and_the_way_out_named(name, calls):
    leaves, form = tree_flatten(calls[name].inputs)
    wanted = "batched_nms_padded takes the whole batch" if name in ("nms", "batched_nms") else "pass the whole batch"
    for place, leaf in enumerate(leaves):

        def of_leaf(value, place=place):
            return calls[name].function(*tree_unflatten([*leaves[:place], value, *leaves[place + 1 :]], form))

        with pytest.raises(RuntimeError, match=f"^{name}: vmap is not supported: .*{wanted}"):
            torch.func.vmap(of_leaf)(leaf[None])


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_changes_nothing(name, calls):
    call = calls[name]
    expected = call.run()
    with torch.autocast("cpu", torch.bfloat16):
        results = call.run()
    assert_same_bits(results, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_checkpointing(name, use_reentrant, calls):
    call = calls[name]
    expected = call.run()
    leaves = [leaf.detach().requires_grad_() for leaf in tree_flatten(call.inputs[: call.num_differentiated])[0]]
    form = tree_flatten(call.inputs[: call.num_differentiated])[1]

    def of_leaves(*leaves):
        return call.function(*tree_unflatten(leaves, form), *call.inputs[call.num_differentiated :])

    loss = checkpoint(of_leaves, *leaves, use_reentrant=use_reentrant)
    loss.backward(torch.ones_like(loss))
    assert_same_bits([loss.detach(), *(leaf.grad for leaf in leaves)], expected)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_functional_gradients(name, calls):
    call = calls[name]
    expected = call.run()
    numbers = tuple(range(call.num_differentiated))
    result, pull_back = torch.func.vjp(
        lambda *first: call.function(*first, *call.inputs[call.num_differentiated :]),
        *(call.inputs[number] for number in numbers),
    )
    gradients = tree_flatten(pull_back(torch.ones_like(result)))[0]
    for mine, right in zip([result, *gradients], expected, strict=True):
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if name == "box_iou" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(mine, right, **tolerance)  # of box_iou it is PyTorch's operations here


@pytest.mark.parametrize("name", ["match_anchors", "nms", "batched_nms"])
def test_compiles_as_one_graph(name):
    """Also where the number of rows in the result is known only when it runs. The others: beside each operator."""
    torch.compiler.reset()
    compiled = None
    for seed in (0, 1):
        call = operator_calls(seed)[name]
        compiled = compiled or torch.compile(call.function, fullgraph=True, backend="aot_eager")
        assert_same_bits(call.run(compiled), call.run())


@pytest.mark.parametrize(
    "name", ["multilevel_focal_loss", "match_anchors", "box_regression_loss", "nms", "batched_nms"]
)
def test_exports(name, calls):
    """The others: beside each operator."""
    call = calls[name]

    class Exported(torch.nn.Module):
        def forward(self, *inputs):
            return call.function(*inputs)

    program = torch.export.export(Exported(), call.inputs).module()
    assert_same_bits(tree_flatten(program(*call.inputs))[0], call._replace(num_differentiated=0).run())


def test_what_follows_nms_is_in_its_graph(calls):
    boxes, scores, labels = calls["batched_nms"].inputs
    nms = calls["batched_nms"].function

    def best(boxes, scores, labels):
        kept = nms(boxes, scores, labels)
        return boxes[kept] * 2, scores[kept].sum()

    torch.compiler.reset()
    compiled = torch.compile(best, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(boxes, scores, labels), best(boxes, scores, labels))
