"""The model of a checkpoint, asked: tensors that were not stored are computed on given rows, and kept by digest."""
