"""Videos, cameras and network streams: reads them, runs each frame through the network, and writes the results.

``reader`` decodes a source that has an end, ``live`` reconnects to one that has none; both deliver a ``frame`` with its
time (``clock``) and audio (``sound``). ``stream`` runs frames through the network, and ``smoothing`` reduces flicker.
``looks`` paints results on frames, which ``movie`` and the other ``sinks`` write, into folders of ``numbered`` files.
``run`` does all of this for one source. ``errors`` translates FFmpeg's errors.
"""
