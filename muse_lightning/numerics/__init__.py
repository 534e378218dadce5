"""Steps whose numbers are wrong: not finite, or not the same twice. Skipped, counted, stopped at, replayed."""
