"""Training in two processes, replicated and sharded, has one process's gradients; spawned processes, its results."""

import pytest
import torch
import torch.distributed as dist
from distributed_steps import RANKS, of_one_process, work
from operator_calls import OPERATORS, operator_calls

from retinanet_ext.models.normalizers import NORMALIZERS


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo, by which processes on CPUs talk")
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(work, (folder,), nprocs=RANKS)
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_gradients_are_those_of_one_process(kind, normalizer, results):
    """The mean over two processes of an image each, which count foreground together where the normalizer does."""
    for found, expected in zip(results[kind, normalizer], of_one_process(normalizer), strict=True):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


def test_every_operator_in_a_spawned_process(results):
    calls = operator_calls()
    for name in OPERATORS:
        for mine, right in zip(results["operators"][name], calls[name].run(), strict=True):
            assert torch.equal(mine, right), name
