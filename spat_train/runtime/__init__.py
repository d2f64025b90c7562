"""What surrounds a long run: its folder and logs, signals, seeds, and other processes."""
