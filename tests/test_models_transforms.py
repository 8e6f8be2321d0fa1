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


def test_detection_compiles(model, images):
    """Not as one graph: how many detections an image has is read by the host."""
    torch.compiler.reset()
    model.eval()
    try:
        with torch.no_grad():
            expected = model(images)
            found = torch.compile(model, backend="eager")(images)
    finally:
        model.train()
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
