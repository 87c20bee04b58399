"""One run's process: the worker, the trainer, its callbacks and the state a checkpoint keeps."""
