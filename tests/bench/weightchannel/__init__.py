"""The parts of `make bench-weights`: workers, the shaped link, and one module for each thing that is measured."""
