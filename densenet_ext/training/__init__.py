"""Training on images: data, networks by name, the loop, checkpoints, pictures. The command line stands on it."""
