"""The contract on the wire: `edgefm.v1`, its generated code and the limits both ends agree on."""
