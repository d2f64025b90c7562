"""Convolutions that do the pass next to them in one launch: what is asked for, by whom it is done, and how that is chosen."""
