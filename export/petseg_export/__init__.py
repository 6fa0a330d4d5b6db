"""petseg's export: from a checkpoint to files that devices run, each with a parity receipt."""
