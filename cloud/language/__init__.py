"""The cloud's language model as a service: which requests run when, how long their answers get, and what they are for."""
