"""What a configuration may say: packaged files, allowed modules, and the first mistake in one line."""
