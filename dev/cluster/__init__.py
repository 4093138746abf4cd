"""A real Kubernetes of several nodes on one Linux machine, without Docker and without an image registry.

The control plane runs on the host; each node is one set of Linux namespaces on a bridge. Read ``network`` for the
addresses, ``node`` for what a node is, ``lifecycle`` for how the parts are put up and taken down.
"""
