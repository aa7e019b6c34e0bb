"""Image files as tensors: decoding, cropping, and what a model expects of its input."""
