from .focal_loss import FocalLoss, py_sigmoid_focal_loss, sigmoid_focal_loss

__all__ = ["FocalLoss", "py_sigmoid_focal_loss", "sigmoid_focal_loss"]
