"""How the embedded model was made: training cycles, a teacher, and the script that bundles a checkpoint."""
