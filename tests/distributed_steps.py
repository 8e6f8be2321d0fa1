"""What each of two processes computes for test_distributed.py: they are spawned, and import all anew."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from operator_calls import operator_calls
from tiny_retinanet import IMAGES, OTHER_TARGETS, TARGETS, tiny_retinanet
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from retinanet_ext.models.normalizers import NORMALIZERS, LossNormalizer

RANKS = 2
STEPS = (TARGETS, OTHER_TARGETS)  # the second one: an image without boxes is elsewhere or nowhere


def train(model, optimizer, images, steps, full=lambda tensor: tensor) -> list[dict[str, torch.Tensor]]:
    """The gradients of each step; `full` puts the parts of a tensor together."""
    gradients = []
    for targets in steps:
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        gradients.append(
            {name.removeprefix("module."): full(leaf.grad).clone() for name, leaf in model.named_parameters()}
        )
        optimizer.step()
    return gradients


def normalized(kind: str) -> torch.nn.Module:
    model = tiny_retinanet()
    model.loss_normalizer = LossNormalizer(kind)
    return model.double()


def of_one_process(normalizer: str) -> list[dict[str, torch.Tensor]]:
    model = normalized(normalizer)
    return train(model, sgd(model), [image.double() for image in IMAGES], STEPS)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    images, steps = [IMAGES[rank].double()], [targets[rank : rank + 1] for targets in STEPS]

    results, mesh = {}, init_device_mesh("cpu", (RANKS,))
    for normalizer in NORMALIZERS:
        replicated = DistributedDataParallel(normalized(normalizer))
        results["replicated", normalizer] = train(replicated, sgd(replicated), images, steps)

        sharded = normalized(normalizer)
        for module in (sharded.backbone, sharded.head, sharded):
            fully_shard(module, mesh=mesh)
        full = train(sharded, sgd(sharded), images, steps, lambda tensor: tensor.full_tensor())
        results["sharded", normalizer] = full

    if rank == 0:
        results["operators"] = {name: call.run() for name, call in operator_calls().items()}
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()
