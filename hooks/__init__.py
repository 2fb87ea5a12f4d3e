"""One file per host entry point. Import it as ``mla_patch.hooks``."""
