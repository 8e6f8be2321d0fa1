import torch


class ImageList:
    """A padded batch [B, C, H, W] and the (height, width) of each image in it."""

    def __init__(self, tensor, image_sizes):
        self.tensor = tensor
        self.image_sizes = image_sizes

    @classmethod
    def from_tensors(cls, tensors, size_divisibility: int = 0):
        sizes = [tuple(image.shape[-2:]) for image in tensors]
        unit = max(size_divisibility, 1)
        height, width = (-(-max(side) // unit) * unit for side in zip(*sizes, strict=True))
        batch = tensors[0].new_zeros((len(tensors), tensors[0].shape[0], height, width))
        for image, padded in zip(tensors, batch, strict=True):
            padded[:, : image.shape[-2], : image.shape[-1]] = image
        return cls(torch.as_tensor(batch), sizes)
