from .focal_loss import FocalLoss, sigmoid_focal_loss

__all__ = ["FocalLoss", "sigmoid_focal_loss"]
