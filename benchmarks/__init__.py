"""Time and memory of a training step, against the DenseNets that people use today."""
