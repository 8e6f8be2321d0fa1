from .focal_loss import SigmoidFocalLoss, sigmoid_focal_loss
from .nms import batched_nms, nms, soft_nms

__all__ = ["SigmoidFocalLoss", "batched_nms", "nms", "sigmoid_focal_loss", "soft_nms"]
