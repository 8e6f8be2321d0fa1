"""Training, evaluation and prediction: what the command `retinanet-ext` runs, callable from Python."""
