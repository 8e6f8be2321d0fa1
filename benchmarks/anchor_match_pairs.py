"""Counts what anchor matching looks at: pairs of a tile and a box, and of an anchor and a box, in each pass.

    python benchmarks/anchor_match_pairs.py
    python benchmarks/anchor_match_pairs.py --output out.json

Walks the tiles as the CPU kernel does on one thread, with the bound of csrc/anchor_match/anchor_match_math.h, and
counts in place of timing: what it prints is the same on every machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from bench_anchor_match import CASES, make_case
from results_file import origin, write_results

from retinanet_ext import box_iou

TILE = 128
BG_IOU_THRESH = 0.4


def may_reach(tile: torch.Tensor, areas: torch.Tensor, boxes: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """bool [M]: boxes that may have an IoU of `threshold` with an anchor of the tile [n, 4]."""
    low, high = tile[:, :2].amin(0), tile[:, 2:].amax(0)
    sides = torch.min(high, boxes[:, 2:]) - torch.max(low, boxes[:, :2])
    sides = torch.min(sides, (tile[:, 2:] - tile[:, :2]).amax(0))
    overlap = sides.prod(1).clamp(max=areas.max().item())
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=areas.min().item())
    return (sides > 0).all(1) & ~(overlap * (1 + 2e-6) < threshold * area)


def count_pairs(anchors: torch.Tensor, boxes: torch.Tensor) -> dict[str, float]:
    """Shares of all N * M pairs of an anchor and a box."""
    tiles = anchors.split(TILE)
    areas = [(tile[:, 2:] - tile[:, :2]).prod(1) for tile in tiles]
    best = torch.zeros(len(boxes))
    touching = first = second = 0
    for tile, area in zip(reversed(tiles), reversed(areas), strict=True):
        touching += len(tile) * may_reach(tile, area, boxes, torch.zeros(())).sum().item()
        listed = may_reach(tile, area, boxes, best.clamp(max=BG_IOU_THRESH)).nonzero().flatten()
        first += len(tile) * len(listed)
        if len(listed) > 0:
            best[listed] = torch.max(best[listed], box_iou(boxes[listed], tile).amax(1))
    for tile, area in zip(tiles, areas, strict=True):
        second += len(tile) * may_reach(tile, area, boxes, best).sum().item()
    pairs = len(anchors) * len(boxes)
    return {"the box meets the tile": touching / pairs, "first pass": first / pairs, "second pass": second / pairs}


def images(cases: dict[str, tuple]) -> list[tuple[tuple[int, int], int]]:
    """Image and number of boxes of the benchmark's cases, each once, those of ragged batches left out."""
    return list(dict.fromkeys((image, count) for image, _, count in cases.values() if count != "ragged"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the json here")
    arguments = parser.parse_args()
    report = {**origin(), "pairs": []}
    for image, count in images(CASES):
        anchors, boxes, _ = make_case((image, 1, count), torch.device("cpu"))
        shares = count_pairs(anchors, boxes[0])
        report["pairs"].append({"image": image, "anchors": len(anchors), "boxes": count, "shares": shares})
        name = f"{image[0]}x{image[1]} M={count}"
        print(f"{name:<16}", *(f"{what} {100 * share:.2f} %" for what, share in shares.items()), sep="  ")
    if arguments.output is not None:
        write_results(arguments.output, report)


if __name__ == "__main__":
    main()
