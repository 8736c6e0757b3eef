"""Stub."""

from trainbox.spec.reading import Reader


class PairReader(Reader):
    pass
