"""How the embedded model was made: cycles of training, a teacher, and what makes a checkpoint the one that ships."""
