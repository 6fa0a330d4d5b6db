"""How the built-in model was made: training cycles, a teacher, and the script that puts a checkpoint in its place."""
