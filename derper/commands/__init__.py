"""The commands beside the relay itself: ``derper probe``, ``prune``, ``region`` and ``status``."""
