"""Programs for other Pythons: environments of packages that are in no lock of ours run in a process of their own."""
