"""Stub."""

from trainbox.spec.reading import Reader


class LabelReader(Reader):
    pass


class TagReader(Reader):
    pass
