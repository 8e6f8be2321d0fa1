def detector_postprocess(results, output_height: int, output_width: int):
    """The detections of an image in its output size: scaled, clipped, without empty boxes."""
    height, width = results.image_size
    boxes = results.pred_boxes
    boxes.tensor = boxes.tensor * boxes.tensor.new_tensor([output_width / width, output_height / height] * 2)
    boxes.clip((output_height, output_width))
    return results[(boxes.tensor[:, 2:] > boxes.tensor[:, :2]).all(dim=1)]
