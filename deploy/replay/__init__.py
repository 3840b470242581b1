"""The laboratory: what a device and its cloud would do on a link, on a virtual clock or on real sockets."""
