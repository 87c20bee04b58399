"""From a file to tokens: readers of formats, columns, examples of five shapes, and their encoding for training."""
