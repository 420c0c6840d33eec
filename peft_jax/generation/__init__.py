"""Text from a model: sampling, the key/value cache, the decoding programs."""
