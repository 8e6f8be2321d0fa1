"""Every operator on CUDA where it is not on the default stream of the current device: other streams, several threads,
other devices; and under autocast."""

import threading

import pytest
import torch
from operator_calls import OPERATORS, operator_calls
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

pytestmark = pytest.mark.cuda

DEVICE = torch.device("cuda")


@pytest.fixture(scope="module")
def calls():
    return {name: call.to(DEVICE) for name, call in operator_calls().items()}


def assert_same(results, expected):
    for mine, right in zip(results, expected, strict=True):
        assert mine.dtype == right.dtype
        assert torch.equal(mine.cpu(), right.cpu())


@pytest.mark.parametrize("name", OPERATORS)
def test_the_current_stream_is_used(name, calls):
    """On the default stream the operator would overtake the copies, which wait behind a long kernel."""
    call = calls[name]
    expected = call.run()
    late = call._replace(inputs=tree_map_only(Tensor, torch.zeros_like, call.inputs))
    late.run()  # kernels are loaded at the first call, and loading may wait for the device
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles, about a tenth of a second
        for static, value in zip(tree_flatten(late.inputs)[0], tree_flatten(call.inputs)[0], strict=True):
            static.copy_(value)
        results = late.run()
    stream.synchronize()
    assert_same(results, expected)


def test_several_threads_with_a_stream_each(calls):
    expected = {name: call.run() for name, call in calls.items()}
    torch.cuda.synchronize()
    found, start = {}, threading.Barrier(4)

    def work(index):
        stream = torch.cuda.Stream()
        start.wait()
        with torch.cuda.stream(stream):
            found[index] = [{name: call.run() for name, call in calls.items()} for _ in range(5)]
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1, 2, 3]  # none of them has failed
    for runs in found.values():
        for run in runs:
            for name, results in run.items():
                assert_same(results, expected[name])


@pytest.mark.parametrize("name", OPERATORS)
def test_a_device_that_is_not_the_current_one(name, calls):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    results = calls[name].to("cuda:1").run()
    assert torch.cuda.current_device() == 0
    assert {result.device for result in results} == {torch.device("cuda:1")}
    assert_same(results, calls[name].run())


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_changes_nothing(name, calls):
    expected = calls[name].run()
    with torch.autocast("cuda", torch.bfloat16):
        results = calls[name].run()
    assert_same(results, expected)
