from .bbox_overlaps import bbox_overlaps

__all__ = ["bbox_overlaps"]
