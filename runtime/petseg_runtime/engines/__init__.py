"""Inference engines behind one small protocol: bytes in, bytes out."""
