"""A whole model of the released sizes, decoding in CUDA graphs."""
