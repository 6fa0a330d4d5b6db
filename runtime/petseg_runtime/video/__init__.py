"""Videos, cameras and streams: what reads them, what takes each frame through the network, and what writes it.

``reader`` decodes a source that has an end, ``live`` keeps one going that has none; ``frame``, ``clock`` and ``sound``
are what comes of it. ``stream`` takes the frames through the network, with ``smoothing`` on the way. ``looks`` paints
results on frames, which ``movie`` and the other ``sinks`` write, in folders of files that are ``numbered``. ``run`` is
all of it, for one source.
"""
