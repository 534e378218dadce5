"""`muse compare`: one model under several attention strategies, and the cheapest setting that keeps its loss."""
