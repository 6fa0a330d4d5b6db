"""The commands that a device runs: no torch, and nothing imported that is not used."""
