"""Images and labels: data sets, their augmentation, and batches in an order that follows from the seed."""
