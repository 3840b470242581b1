"""The commands of `edgefm`: a module each group; `edgefm.deploy.cli` puts them together."""
