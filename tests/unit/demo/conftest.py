"""These tests run on one torch thread each."""

from tests.support.one_thread import one_thread

__all__ = ["one_thread"]
