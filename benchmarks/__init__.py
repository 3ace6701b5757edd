"""Time and memory of shardspec against training steps written by hand: `python -m benchmarks.bench`."""
