"""Which models exist: agents from drop-in folders and YAML, by canonical id, alias and bare name."""
