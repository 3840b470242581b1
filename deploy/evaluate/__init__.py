"""The evaluation: the product against its rivals, from the same weights and on the same samples."""
