"""The cloud's language model: a Llama-family decoder on `edgefm.models.attention`, its weights, tokenizer and generation."""
