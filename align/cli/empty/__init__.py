"""A folder without modules: `align run` starts its processes here, see `align.cli.processes`."""
