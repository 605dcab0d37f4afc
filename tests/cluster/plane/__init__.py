"""A Kubernetes of real parts on loopback for tests: `make test-cluster`.

etcd, apiserver, controller-manager and scheduler are the real programs (build.sh, `control.py`). The nodes are played:
no container runs, but each pod's process does, in a box that has what the pod asks for (`nodes.py`, `box.py`). The
control plane that can be built here is 1.20, the chart is for 1.34 and later; `front.py` speaks the newer API.
"""
