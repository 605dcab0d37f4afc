"""Adapters: environments and tools that others wrote. Each needs an optional extra, imported only when it is used."""
