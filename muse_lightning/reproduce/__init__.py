"""`muse reproduce`: a run again, from what it has left, and whether its losses come out the same."""
