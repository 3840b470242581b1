"""Attention of the cloud's language model: one interface, plain references, fused implementations."""
