"""The ``train``, ``evaluate`` and ``data`` commands: they parse options, call the library, and print the results."""
