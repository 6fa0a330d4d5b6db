"""petseg's benchmarks: programs that write records to ``benchmarks/results`` (not part of the installed package)."""
