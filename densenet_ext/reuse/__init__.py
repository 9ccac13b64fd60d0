"""Which layer of a DenseNet uses which: the paper's figure 5, from the checkpoint of any library."""
