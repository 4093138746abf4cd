"""What developers run: the embedded Kubernetes cluster and the demo."""
