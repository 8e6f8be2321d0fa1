"""RetinaNet under torch.compile, checkpointing and torch.func: the losses and gradients are those of a plain step."""

import pytest
import torch
from tiny_retinanet import IMAGES, OTHER_TARGETS, TARGETS, tiny_retinanet
from torch.utils.checkpoint import checkpoint


@pytest.fixture(scope="module")
def model():
    return tiny_retinanet()


@pytest.fixture(scope="module")
def images():
    return IMAGES


def losses_and_gradients(model, losses):
    gradients = torch.autograd.grad(sum(losses.values()), list(model.parameters()))
    return torch.stack(list(losses.values())).detach(), dict(
        zip(dict(model.named_parameters()), gradients, strict=True)
    )


def assert_same_step(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-7)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6 + 1e-5 * gradient.abs().max().item())


@pytest.fixture(scope="module")
def expected(model, images):
    return losses_and_gradients(model, model(images, TARGETS))


def test_a_training_step_compiles_as_one_graph(model, images, expected):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_same_step(losses_and_gradients(model, compiled(images, TARGETS)), expected)
    other = losses_and_gradients(model, model(images, OTHER_TARGETS))
    assert_same_step(losses_and_gradients(model, compiled(images, OTHER_TARGETS)), other)


class Graphs:
    """A backend that notes the operators of each graph and runs it as it is."""

    def __init__(self):
        self.operators = []

    def __call__(self, graph, inputs):
        self.operators.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph


@pytest.fixture
def detector(model):
    torch.compiler.reset()
    yield model.eval()
    model.train()


OTHER_SIZES = list(torch.rand(3, 3, 48, 70, generator=torch.Generator().manual_seed(2)))


def test_padded_detections_compile_as_one_graph(detector, images):
    compiled = torch.compile(detector.padded_detections, fullgraph=True, backend="eager")
    for batch in (images, OTHER_SIZES):
        with torch.no_grad():
            found, expected = compiled(batch), detector(batch)
        assert found.boxes.shape == (len(batch), 300, 4)
        assert found.labels.dtype == torch.int64
        assert found.counts.tolist() == [len(right["labels"]) for right in expected]
        for image, (count, right) in enumerate(zip(found.counts, expected, strict=True)):
            assert 0 < count < 300
            for name, padding in (("boxes", 0), ("scores", 0), ("labels", -1)):
                values = getattr(found, name)[image]
                torch.testing.assert_close(values[:count], right[name])
                assert (values[count:] == padding).all()


def test_padded_detections_are_of_evaluation(model, images):
    with pytest.raises(ValueError, match=r"model: expected evaluation mode.*got training mode"):
        model.padded_detections(images)


@pytest.mark.parametrize("validation", [False, True])
def test_detection_breaks_the_graph_after_the_operators_alone(detector, images, validation):
    """Lists of detections are as long as the counts say, which the host reads; all before that is one graph."""
    graphs = Graphs()
    function, inputs = (detector.detections_and_losses, (images, TARGETS)) if validation else (detector, (images,))
    with torch.no_grad():
        expected = function(*inputs)
        found = torch.compile(function, backend=graphs)(*inputs)
    whole, *rest = graphs.operators
    detect = torch.ops.retinanet_ext.detect.default
    assert whole.count(torch.conv2d) > 10
    assert whole.count(detect) == 1
    assert not {torch.conv2d, detect} & {operator for graph in rest for operator in graph}
    if validation:
        torch.testing.assert_close(found[1], expected[1])
        found, expected = found[0], expected[0]
    for mine, right in zip(found, expected, strict=True):
        assert len(right["labels"]) > 0
        assert torch.equal(mine["labels"], right["labels"])
        torch.testing.assert_close(mine["boxes"], right["boxes"])


def test_images_that_require_a_gradient(model, images):
    leaves = [image.clone().requires_grad_() for image in images]
    sum(model(leaves, TARGETS).values()).backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_step(model, images, expected, use_reentrant):
    """The whole step: forward once more in the backward pass."""
    batch = torch.stack(images).requires_grad_()  # a reentrant checkpoint wants an input that requires a gradient

    def step(batch):
        losses = model(list(batch), TARGETS)
        return losses["classification"], losses["bbox_regression"]

    model.zero_grad()
    losses = checkpoint(step, batch, use_reentrant=use_reentrant)
    sum(losses).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same_step((torch.stack(losses).detach(), gradients), expected)


def test_functional_gradients_of_the_parameters(model, images, expected):
    def total(parameters):
        losses = torch.func.functional_call(model, parameters, (images, TARGETS))
        return sum(losses.values()), torch.stack(list(losses.values()))

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    gradients, losses = torch.func.grad(total, has_aux=True)(parameters)
    assert_same_step((losses, gradients), expected)
