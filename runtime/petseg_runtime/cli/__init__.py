"""The commands of the runtime package; they need no torch, and import modules only when they use them."""
