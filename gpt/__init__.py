import core  # noqa: F401  quiet Ctrl-C, before torch is imported
