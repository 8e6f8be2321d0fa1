from mmdet.structures.bbox import bbox_overlaps


class BboxOverlaps2D:
    def __init__(self, scale=1.0, dtype=None):
        self.scale, self.dtype = scale, dtype

    def __call__(self, bboxes1, bboxes2, mode="iou", is_aligned=False):
        if self.dtype == "fp16":
            halves = ((boxes / self.scale).half() for boxes in (bboxes1, bboxes2))
            return bbox_overlaps(*halves, mode, is_aligned).float()
        return bbox_overlaps(bboxes1[..., :4], bboxes2[..., :4], mode, is_aligned)
