"""Exceptions of the store, one class per kind of failure."""


class StoreError(Exception):
    """Base class: the store cannot do what was asked; the message says what, where and the remedy."""

    def __str__(self) -> str:
        # KeyError, a base of FileNotInManifest, would print the repr of the message.
        return " ".join(str(part) for part in self.args)


class ObjectMissing(StoreError):
    """A key that was read is not in the store."""


class DamagedObject(StoreError):
    """Bytes in the store do not match their recorded size or sha256."""


class UnknownArtifact(StoreError):
    """No artifact has the digest that was asked for."""


class AmbiguousDigest(StoreError):
    """Several artifacts begin with the digest prefix that was asked for."""


class FileNotInManifest(StoreError, KeyError):
    """A manifest has no file of that path."""


class TokenizerMismatch(StoreError, ValueError):
    """A code table was made by another tokenizer than the one that is about to read it."""


def on_one_line(text: object) -> str:
    """Return a text, or an exception's message, with all white space as single spaces."""
    return " ".join(str(text).split())
