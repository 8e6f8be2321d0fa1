from .focal_loss import sigmoid_focal_loss, sigmoid_focal_loss_jit
from .giou_loss import giou_loss
from .smooth_l1_loss import smooth_l1_loss

__all__ = ["giou_loss", "sigmoid_focal_loss", "sigmoid_focal_loss_jit", "smooth_l1_loss"]
