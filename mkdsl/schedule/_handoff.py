"""How a tensor is handed from the phase that writes it to those that read it."""

import enum


class Handoff(enum.StrEnum):
    """SENTINEL: words prove themselves. All their bits are set until they are written, and a relaxed counter only says when to look.
    RELEASE_ACQUIRE: plain words behind a counter that is released after they are written and acquired before they are read."""

    SENTINEL = "sentinel"
    RELEASE_ACQUIRE = "release-acquire"

    @property
    def self_validating(self) -> bool:
        """Whether a reader sees by the words themselves that they have been written."""
        return self is Handoff.SENTINEL

    @property
    def releases(self) -> bool:
        """Whether the counter orders the stores before it."""
        return self is Handoff.RELEASE_ACQUIRE

    @property
    def other(self) -> "Handoff":
        return Handoff.RELEASE_ACQUIRE if self is Handoff.SENTINEL else Handoff.SENTINEL
