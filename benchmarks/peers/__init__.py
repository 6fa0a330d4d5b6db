"""petseg beside its peers: an environment for each side, and the same photos through both.

The modules ``loops``, ``networks``, ``shape`` and ``u2net`` are run by the peers' interpreter, ``installed`` and
``watch`` by any; none of these may import petseg.
"""
