"""Every operator in several threads at once, and in processes forked off one that has used its threads."""

import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch
from operator_calls import OPERATORS, operator_calls
from rank_processes import in_processes

import retinanet_ext


@pytest.fixture(scope="module")
def calls():
    return operator_calls()


@pytest.fixture(scope="module")
def expected(calls):
    return {name: call.run() for name, call in calls.items()}


def as_bytes(tensors):
    """By NumPy, which starts no threads."""
    return [tensor.numpy().tobytes() for tensor in tensors]


def test_every_operator_is_called():
    named = {name for name in retinanet_ext.__all__ if callable(getattr(retinanet_ext, name))}
    assert set(OPERATORS) == named - {"accelerate", "build_info", "patch"}


def test_several_threads_at_once(calls, expected, num_threads):
    num_threads(2)
    found, start = {}, threading.Barrier(4)

    def work(index):
        start.wait()
        found[index] = {name: call.run() for _ in range(2) for name, call in calls.items()}

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1, 2, 3]  # none of them has failed
    for results in found.values():
        for name, result in results.items():
            assert as_bytes(result) == as_bytes(expected[name]), name


def run_in_fork(work, seconds=30):
    """ "done", "failed", or "hung": how a forked process has ended."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "done" if status == 0 else "failed"
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hung"


def fork_with_each_operator():
    """How a forked process has ended, by the operator that it and its parent have called with several threads."""
    torch.set_num_threads(2)
    outcomes = {}
    for name, call in operator_calls().items():
        right = as_bytes(call.run())

        def work(call=call, right=right):
            assert torch.get_num_threads() == 2
            for _ in range(2):
                assert as_bytes(call.run()) == right

        outcomes[name] = run_in_fork(work, seconds=5)
    return outcomes


@pytest.fixture(scope="module")
def outcomes_of_forks():
    """In a process of its own: autograd refuses to work in a fork of one that has started its threads for devices, as
    other tests have."""
    return in_processes(1, fork_with_each_operator, start="spawn")[0]


@pytest.mark.parametrize("name", OPERATORS)
def test_in_a_forked_process_whose_parent_has_used_its_threads(name, outcomes_of_forks):
    """OpenMP in the child still counts on the parent's threads."""
    assert outcomes_of_forks[name] == "done"


def test_an_error_in_a_forked_process(calls, num_threads):
    """One that several threads meet."""
    num_threads(2)
    call = calls["box_regression_loss"]
    deltas, anchors, gt_boxes, matched, normalizer = call.inputs
    wrong = call._replace(inputs=(deltas, anchors, gt_boxes, torch.full_like(matched, 9), normalizer))

    def work():
        with pytest.raises(RuntimeError, match="box_regression_loss: matched"):
            wrong.run()

    with pytest.raises(RuntimeError, match="box_regression_loss: matched"):
        wrong.run()
    assert run_in_fork(work) == "done"


class CalledInWorkers(torch.utils.data.Dataset):
    """Suppression while data is loaded, as of proposals made before."""

    def __init__(self, calls):
        self.calls = calls

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.calls["batched_nms"].run()[0]


def test_in_workers_of_a_data_loader(calls, expected, num_threads):
    num_threads(2)
    calls["batched_nms"].run()
    data = CalledInWorkers({"batched_nms": calls["batched_nms"]})
    context = multiprocessing.get_context("fork")
    for kept in torch.utils.data.DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=context):
        assert torch.equal(kept, expected["batched_nms"][0])
