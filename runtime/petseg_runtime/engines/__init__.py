"""Inference engines behind one small protocol: uint8 images in, uint8 probabilities out."""
