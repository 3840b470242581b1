"""What runs in the data centre: service, batching, sample store, customization, registry."""
