"""Stub."""

from trainbox.spec.reading import Reader


class PreferenceReader(Reader):
    pass


class PromptReader(Reader):
    pass
