"""Compare petseg with its peers: one environment for each side, and the same photos for both.

The modules ``loops``, ``networks``, ``shape`` and ``u2net`` run in the peers' interpreter, ``installed`` and ``watch``
in any; none of these may import petseg.
"""
